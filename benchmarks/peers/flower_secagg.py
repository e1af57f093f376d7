"""CPU seconds of Flower's SecAgg+, its own workflow and its own client modifier, in one process without any network.

    .venv-flower/bin/python flower_secagg.py CLIENTS ENTRIES SHARES THRESHOLD

prints a line of JSON: seconds of the server, and of one client (the median). Started by ``benchmarks/secagg.py``.
Messages are handed over as objects; nothing is packed for a wire, as in our own measurement.
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters
from flwr.compat.common import recorddict_compat
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity


class Loopback:
    """Clients in place of a network; each one's CPU time, and what all took."""

    def __init__(self, count: int, entries: int) -> None:
        self.contexts = {i: Context(0, i, {}, RecordDict(), {}) for i in range(1, count + 1)}
        self.seconds, self.copying = dict.fromkeys(self.contexts, 0.0), 0.0
        update = np.random.default_rng(0).uniform(-1, 1, entries).astype(np.float32)
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([update]), 1, {})
        self.app = lambda message, context: Message(
            recorddict_compat.fitres_to_recorddict(result, keep_input=True), reply_to=message
        )

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        assert timeout is None
        answers = []
        for message in messages:
            who, begin = message.metadata.dst_node_id, time.process_time()
            own = copy.deepcopy(message)  # a network gives everybody a copy; a client takes its apart
            at = time.process_time()
            answers.append(secaggplus_mod(own, self.contexts[who], self.app))
            self.seconds[who] += time.process_time() - at
            self.copying += at - begin
        return answers


class Strategy:
    """Asks everybody."""

    def __init__(self, count: int) -> None:
        self.proxies = [SimpleNamespace(node_id=i, cid=str(i)) for i in range(1, count + 1)]
        self.results = 0

    def configure_fit(self, _round: int, parameters: object, _clients: object) -> list[tuple[object, FitIns]]:
        return [(proxy, FitIns(parameters, {})) for proxy in self.proxies]

    def aggregate_fit(self, _round: int, results: list[object], _failures: list[object]) -> tuple[None, dict]:
        self.results = len(results)
        return None, {}


def main() -> None:
    count, entries, shares, threshold = map(int, sys.argv[1:])
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0  # what its SuperLink would say
    state = RecordDict()
    state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    zeros = ndarrays_to_parameters([np.zeros(entries, np.float32)])
    state.array_records[MAIN_PARAMS_RECORD] = recorddict_compat.parameters_to_arrayrecord(zeros, keep_input=True)
    strategy = Strategy(count)
    context = LegacyContext(
        Context(0, 0, {}, state, {}), strategy=strategy, client_manager=SimpleNamespace(num_available=lambda: count)
    )
    grid = Loopback(count, entries)
    # As many levels as our 16 bits; clients all count the same.
    workflow = SecAggPlusWorkflow(shares, threshold, max_weight=1.0, clipping_range=1.0, quantization_range=2**16)
    at = time.process_time()
    workflow(grid, context)
    server = time.process_time() - at - sum(grid.seconds.values()) - grid.copying
    if strategy.results != count:
        raise SystemExit(f"{strategy.results} of {count} results were aggregated")
    print(json.dumps({"client": statistics.median(grid.seconds.values()), "server": server}))


if __name__ == "__main__":
    main()
