"""What the training process does to a round: to the bit what the simulator's plain executor does to that client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
from foedus.backends import open_trainer
from foedus.errors import BundleRefused, ConfigurationError, MalformedMessage
from foedus.net.bench import Bench
from foedus.net.bundle import Bundle, import_bundle
from foedus.net.source import own, to_bytes
from foedus.protocol import blob
from foedus.rounds.debug import DebugSession
from foedus.rounds.freight import figures_of, orders_blob, parcel_of, update_blob
from foedus.rounds.parcel import Terms, packed
from foedus.rounds.visits import layouts_of
from foedus.rounds.work import Job, Orders

SOURCE = """
import foedus as fd

class federation:
    task = fd.Task(fd.logistic(3, 2), metrics=[fd.accuracy])
    algorithm = {algorithm}

def function():
    return federation

number = 3
"""
ALGORITHMS = {
    "fedavg": "fd.fedavg(fd.local_sgd(0.1, batch_size=4))",
    "scaffold": "fd.scaffold(fd.local_sgd(0.1, batch_size=4))",
    "ditto": "fd.fedavg(fd.local_sgd(0.1, batch_size=4), personal=fd.ditto(0.1))",
    "coded": "fd.fedavg(fd.local_sgd(0.1), aggregator=fd.chain(fd.rotate(), fd.quantise(bits=4), fd.mean()))",
    "buffered": "fd.fedavg(fd.local_sgd(0.1)).with_(timing=fd.buffered(2))",
}
RNG = np.random.default_rng(0)
DATA = {i: (RNG.normal(size=(9 + i, 3)).astype(np.float32), RNG.integers(0, 2, 9 + i)) for i in range(4)}
POSITION, SEED = 2, 5


def bundled(folder: Path, algorithm: str, target: str = "task:federation") -> dict[str, Any]:
    bundle = Bundle.of({"task.py": SOURCE.format(algorithm=algorithm).encode()})
    (folder / "bundle").write_bytes(bundle.content)
    said = {"bundle": str(folder / "bundle"), "digest": bundle.digest, "target": target, "seed": SEED}
    return {"do": "open", **said}


def ready(folder: Path, algorithm: str) -> Bench:
    bench = Bench(folder)
    said, _ = bench.do({"do": "data", "checks": {}}, (to_bytes(own(DATA[POSITION])),))
    assert said["examples"] == 11
    bench.do(bundled(folder, algorithm), ())
    return bench


def simulated(folder: Path, algorithm: str) -> tuple[Job, Any, Orders]:
    said = bundled(folder, algorithm)
    found = import_bundle(Path(said["bundle"]), said["digest"], said["target"])
    trainer = open_trainer(found.task, seed=SEED)
    job = Job(found.task, found.algorithm, fd.Clients.of(DATA), SEED)
    method = found.algorithm.method
    first = trainer.initial()
    state = {} if method is None else method.init(first.vector, 4)
    down = {} if method is None else method.down(state)
    return job, trainer, Orders(3, first, np.empty(0, np.int64), down=down)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_update_has_the_bits_of_the_simulated_one(tmp_path: Path, name: str) -> None:
    bench = ready(tmp_path, ALGORITHMS[name])
    job, trainer, orders = simulated(tmp_path, ALGORITHMS[name])
    terms = Terms.of(job, orders, layouts_of(trainer))
    sent = orders_blob(orders, terms.travels, run="r")
    own_part: tuple[bytes, ...] = ()
    kept: dict[str, Any] = {}
    for _ in range(2):  # the second visit begins with what the first kept
        said, _ = bench.do({"do": "train", "position": POSITION}, (sent, *own_part))
        assert said["trained"]
        scale = 0.5 if name == "buffered" else 1.0
        said, (update, *own_part_) = bench.do({"do": "encode", "scale": scale}, ())
        own_part = tuple(own_part_)
        here = replace(orders, cohort=np.array([POSITION]), kept={POSITION: kept} if kept else {}, scale=scale)
        given = DebugSession(job, trainer).run(replace(here, single=True)).given[POSITION]
        parcel = packed(replace_orders(terms, here), POSITION, given.contribution, given.examples)
        assert update == update_blob(parcel)
        assert said["keeps"] is (parcel.kept is not None)
        kept = dict(parcel.kept or {})
    assert parcel_of(blob.unpack(update)).examples == 11


def replace_orders(terms: Terms, orders: Orders) -> Terms:
    return terms._replace(orders=orders)


def test_evaluation_and_the_final_model(tmp_path: Path) -> None:
    bench = ready(tmp_path, ALGORITHMS["ditto"])
    job, trainer, orders = simulated(tmp_path, ALGORITHMS["ditto"])
    sent = orders_blob(orders, Terms.of(job, orders, layouts_of(trainer)).travels, run="r")
    bench.do({"do": "train", "position": POSITION}, (sent,))
    _, (_, kept) = bench.do({"do": "encode"}, ())
    _, (figures,) = bench.do({"do": "evaluate", "position": POSITION}, (sent, kept))
    found = figures_of(blob.unpack(figures))
    wanted = trainer.evaluate(orders.start, fd.Examples.of(*DATA[POSITION]))
    assert (found.examples, found.figures) == (11, wanted)
    assert found.personal is not None
    assert found.personal["loss"] < wanted["loss"]
    said, (model, personal) = bench.do({"do": "finish", "position": POSITION, "personal": True}, (sent, kept))
    assert said["personal"]
    named = blob.unpack(model).arrays
    assert {n: a.shape for n, a in named.items()} == {"weight": (3, 2), "bias": (2,)}
    assert not np.array_equal(named["weight"], blob.unpack(personal).arrays["weight"])


def test_a_task_is_opened_once_and_may_be_a_function(tmp_path: Path) -> None:
    bench = ready(tmp_path, ALGORITHMS["fedavg"])
    opened = bench._open
    bench.do(bundled(tmp_path, ALGORITHMS["fedavg"]), ())
    assert bench._open is opened
    said, _ = bench.do(bundled(tmp_path, ALGORITHMS["fedavg"], "task:function"), ())
    assert "local_sgd" in said["algorithm"]
    assert not said["stale"]
    assert bench.do(bundled(tmp_path, ALGORITHMS["buffered"]), ())[0]["stale"]


def test_what_cannot_be_done_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(ConfigurationError, match="no task yet"):
        bench.do({"do": "train", "position": 0}, (b"",))
    with pytest.raises(ConfigurationError, match="train first"):
        bench.do({"do": "encode"}, ())
    with pytest.raises(ConfigurationError, match="is of type int, and has no task"):
        bench.do(bundled(tmp_path, ALGORITHMS["fedavg"], "task:number"), ())
    bench.do(bundled(tmp_path, ALGORITHMS["fedavg"]), ())
    with pytest.raises(ConfigurationError, match="no data yet"):
        bench.do({"do": "train", "position": 0}, (b"",))


def test_a_bundle_that_is_not_the_one_approved_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    said = bundled(tmp_path, ALGORITHMS["fedavg"])
    other = Bundle.of({"task.py": f"open({str(mark)!r}, 'w').close()\n".encode()})
    (tmp_path / "bundle").write_bytes(other.content)
    with pytest.raises(BundleRefused):
        Bench(tmp_path).do(said, ())
    assert not mark.exists()


def test_clients_without_examples_do_not_train(tmp_path: Path) -> None:
    bench = ready(tmp_path, ALGORITHMS["fedavg"])
    empty = own((np.zeros((0, 3), np.float32), np.zeros(0, np.int64)))
    assert bench.do({"do": "data", "checks": {"labels": [1]}}, (to_bytes(empty),))[0] == {"examples": 0, "findings": []}
    job, trainer, orders = simulated(tmp_path, ALGORITHMS["fedavg"])
    sent = orders_blob(orders, Terms.of(job, orders, layouts_of(trainer)).travels, run="r")
    assert bench.do({"do": "train", "position": 0}, (sent,))[0] == {"trained": False}


# --- noise of the client's own --------------------------------------------------------------------------------

LOCAL = "fd.fedavg(fd.local_sgd(0.1), aggregator=fd.chain(fd.privacy.local(clip=1.0, noise_multiplier={z}), fd.mean()))"
CENTRAL = "fd.fedavg(fd.local_sgd(0.1), aggregator=fd.privacy.central(clip=1.0, noise_multiplier=1.0, cohort=3))"
FOUR = '{"event": "LocalGaussian", "noise_multiplier": 4.0}'
PRIVATE = "fd.fedavg(fd.dp_sgd(0.1, clip=1.0, noise_multiplier=1.0, batch_size=4, steps=1)){more}"


def released(bench: Bench, folder: Path, algorithm: str, part: int = 0, **asked: Any) -> dict[str, Any]:
    job, trainer, orders = simulated(folder, algorithm)
    sent = orders_blob(replace(orders, part=part), Terms.of(job, orders, layouts_of(trainer)).travels, run="r")
    return bench.do({"do": "release", "position": POSITION, **asked}, (sent,))[0]


@pytest.mark.parametrize(
    ("algorithm", "noised", "kind"),
    [
        ("fd.fedavg(fd.local_sgd(0.1))", False, ""),
        (
            "fd.fedavg(fd.local_sgd(0.1), aggregator=fd.privacy.central(clip=1.0, noise_multiplier=1.0, cohort=3))",
            False,
            "",
        ),
        (LOCAL.format(z=4.0), True, '{"event": "LocalGaussian", "noise_multiplier": 4.0}'),
        (
            LOCAL.format(z=4.0) + ".with_(timing=fd.buffered(2))",
            True,
            '{"event": "LocalGaussian", "noise_multiplier": 4.0}',
        ),
        (PRIVATE.format(more=""), True, ""),
    ],
)
def test_what_an_update_with_noise_is(tmp_path: Path, algorithm: str, noised: bool, kind: str) -> None:
    bench = ready(tmp_path, algorithm)
    said, _ = bench.do(bundled(tmp_path, algorithm), ())
    assert said["noised"] is noised
    found = released(bench, tmp_path, algorithm)
    assert (found["part"], found["kind"], found["told"]) == (0, kind, "")


def test_what_an_owner_allows_is_counted_over_all_that_left(tmp_path: Path) -> None:
    algorithm = LOCAL.format(z=4.0)
    bench = ready(tmp_path, algorithm)
    other = '{"event": "LocalGaussian", "noise_multiplier": 2.0}'
    asked = {"most": 5.0, "delta": 1e-5}
    assert not released(bench, tmp_path, algorithm, kinds={FOUR: 3}, **asked)["told"]
    assert "one update more" in released(bench, tmp_path, algorithm, kinds={FOUR: 3, other: 1}, **asked)["told"]
    assert "one update more" in released(bench, tmp_path, algorithm, kinds={FOUR: 9, "": 2}, **asked)["told"]
    other_task = ready(tmp_path, PRIVATE.format(more=""))
    told = released(other_task, tmp_path, PRIVATE.format(more=""), kinds={}, **asked)["told"]
    assert "has clients add no noise to what they send" in told


def test_parts_of_a_round_are_as_many_as_the_task_says(tmp_path: Path) -> None:
    edges = PRIVATE.format(more=".with_(timing=fd.hierarchical(2, rounds=3))")
    bench = ready(tmp_path, edges)
    assert released(bench, tmp_path, edges, part=2)["part"] == 2
    with pytest.raises(MalformedMessage, match="of part 3 of a round, and there are 3"):
        released(bench, tmp_path, edges, part=3)
