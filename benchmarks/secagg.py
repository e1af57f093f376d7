"""Secure aggregation: CPU seconds of client and server beside the arithmetic that cannot be saved, and bytes beside the
published formula.

    python benchmarks/secagg.py                 # all but the paper's table: about eight minutes
    python benchmarks/secagg.py --paper 500     # its table, too, for 500 clients (1000: a quarter of an hour)

Every setting is a whole attempt in one process: real keys, shares, masks and answers, of all clients. The *bound* is
computed from the rates of the primitives, measured in the same run: masks expanded and added, key agreements, keys
derived, shares sealed, opened, dealt and put together, masked vectors added up (as whole words). Packing and unpacking
to the bit, checks, messages and Python are what is above it. CPU seconds of one core, so that other programs disturb
the ratios little.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SIZE, LARGE = 199_210, 1_663_370
CORRUPT = 0.1
PUBLISHED = {  # seconds, Java, one thread, 100,000 entries of 24 bits (Bonawitz et al. 2017, tables 1 and 2)
    500: {"client": 0.85, "server": {0: 2.0, 10: 62.0, 30: 143.0}},
    1000: {"client": 1.7, "server": {0: 4.9, 10: 181.0, 30: 414.0}},
}
PEERS = Path(__file__).resolve().parent / "peers"

import numpy as np  # noqa: E402

from foedus.protocol.secagg import client as clients  # noqa: E402
from foedus.protocol.secagg import messages  # noqa: E402
from foedus.protocol.secagg import server as servers  # noqa: E402
from foedus.secure import primitives, sharing, traffic  # noqa: E402
from foedus.secure.fixed_point import width  # noqa: E402
from foedus.secure.graph import Withstand  # noqa: E402
from foedus.secure.planes import packed, word  # noqa: E402

Figures = dict[str, Any]
MODEL = bytes(32)


# --- rates --------------------------------------------------------------------------------------------------


def median(function: Callable[[], object], *, most: int = 60, seconds: float = 0.5) -> float:
    """CPU seconds of one call: the median of some, since an attempt has no choice of moments either."""
    found, begin = [], time.perf_counter()
    for _ in range(most):
        at = time.process_time()
        function()
        found.append(time.process_time() - at)
        if time.perf_counter() - begin > seconds:
            break
    return statistics.median(found)


def per_call(function: Callable[[], object], *, calls: int = 200) -> float:
    """CPU seconds of one of many short calls."""

    def many() -> None:
        for _ in range(calls):
            function()

    return median(many) / calls


class Rates(NamedTuple):
    """CPU seconds of one: key agreement, derived key, sealing, opening, public key; a mask and a vector of the size."""

    agreement: float
    derived: float
    sealed: float
    opened: float
    public: float
    mask: float
    added: float


def rates(size: int, bits: int) -> Rates:
    """Measured now."""
    one, other = primitives.Agreement(bytes(range(32))), primitives.public_key(bytes(range(1, 33)))
    parcel = primitives.sealed(bytes(32), bytes(64), b"context" * 6)
    total = np.zeros(size, word(bits))
    come = itertools.cycle(
        [np.ones(size, word(bits)) for _ in range(max(64, 2**25 // size))]
    )  # from memory, as messages do
    return Rates(
        per_call(lambda: one.secret(other)),
        per_call(lambda: primitives.derived(bytes(32), b"context" * 6)),
        per_call(lambda: primitives.sealed(bytes(32), bytes(64), b"context" * 6)),
        per_call(lambda: primitives.opened(bytes(32), parcel, b"context" * 6)),
        per_call(lambda: primitives.public_key(bytes(range(32)))),
        median(lambda: primitives.add_mask([total], bytes(32))),
        median(lambda: np.add(total, next(come), out=total)),
    )


def dealing(holders: int, threshold: int) -> float:
    """CPU seconds of sharing two secrets."""
    secret, points = np.zeros((2, 32), np.uint8), np.arange(1, holders + 1)
    count = (threshold - 1) * 2 * sharing.WORDS
    random = sharing.coefficients(bytes(sharing.spare(count)), count)
    return median(lambda: sharing.shares(secret, points, threshold, random), most=10)


def putting_together(secrets_: int, threshold: int, *, alike: bool) -> float:
    """CPU seconds of recovering so many secrets, from the same holders or from others each."""
    if not secrets_:
        return 0.0
    if alike:
        held = np.zeros((threshold, secrets_, 32), np.uint8)
        return median(lambda: sharing.recovered(held, np.arange(1, threshold + 1)), most=5)
    held = np.zeros((secrets_, threshold, 32), np.uint8)
    points = np.tile(np.arange(1, threshold + 1), (secrets_, 1))
    return median(lambda: sharing.recovered_apart(held, points), most=5)


# --- an attempt ---------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What is withstood, entries, bits of a number of the sum, and the percentages of clients that drop out."""

    withstand: Withstand
    size: int
    bits: int
    drops: tuple[int, ...]


class Clock:
    """CPU seconds of every client, and of the server."""

    def __init__(self, count: int) -> None:
        self.clients = np.zeros(count)
        self.server = 0.0


def attempts(setting: Setting) -> Iterator[Figures]:
    """One attempt up to the delivery of shares, and from there on once for every share of dropouts: what clients send
    does not depend on who drops out after them."""
    withstand, count = setting.withstand, setting.withstand.clients
    promise = promised(withstand, setting.size, setting.bits)
    terms = messages.terms_for(
        promise, session=bytes(16), round=1, attempt=1, model=MODEL, graph=secrets.token_bytes(32), clients=count
    )
    clock, states = Clock(count), {}
    server = servers.open_attempt(terms)
    said: dict[int, Any] = {}
    for slot in range(count):
        at = time.process_time()
        states[slot], actions = clients.begin(terms, owned(slot, promise))
        clock.clients[slot] += time.process_time() - at
        said[slot] = actions[-1].message
    for _ in range(2):
        server, told = heard(server, said, clock)
        said = answered(states, told, clock)
    numbers = np.random.default_rng(0).integers(0, 2**16, setting.size, np.uint32).astype(word(setting.bits))
    said = masked(states, numbers, clock)
    before = clock.server
    for percent in setting.drops:
        clock.server = before
        lost = np.random.default_rng(percent).permutation(count)[: count * percent // 100]
        yield finished(copy.deepcopy(server), states, said, set(lost.tolist()), clock) | {"drop": percent}


def promised(withstand: Withstand, entries: int, bits: int) -> messages.Promise:
    """Of one channel."""
    return messages.Promise(withstand, 2, (messages.Channel("update", entries, bits),))


def owned(slot: int, promise: messages.Promise) -> clients.Own:
    return clients.Own(slot, promise, secrets.token_bytes(32), MODEL)


def heard(server: servers.Server, said: dict[int, Any], clock: Clock) -> tuple[servers.Server, dict[int, Any]]:
    """The server hears what clients said; what it tells them."""
    told = {}
    for slot, message in said.items():
        at = time.process_time()
        server, actions = servers.step(server, servers.From(slot, message))
        clock.server += time.process_time() - at
        told |= {a.slot: a.message for a in actions if isinstance(a, servers.Send)}
    return server, told


def answered(states: dict[int, clients.Client], told: dict[int, Any], clock: Clock) -> dict[int, Any]:
    """What clients say to what they are told."""
    said = {}
    for slot, message in told.items():
        at = time.process_time()
        states[slot], actions = clients.step(states[slot], message)
        clock.clients[slot] += time.process_time() - at
        if sends := [a.message for a in actions if isinstance(a, clients.Send)]:
            said[slot] = sends[-1]
    return said


def masked(states: dict[int, clients.Client], numbers: np.ndarray, clock: Clock) -> dict[int, Any]:
    """Clients mask their numbers."""
    said = {}
    for slot in states:
        at = time.process_time()
        states[slot], actions = clients.step(states[slot], clients.Numbers((numbers,)))
        clock.clients[slot] += time.process_time() - at
        said[slot] = actions[-1].message
    return said


def finished(
    server: servers.Server, states: dict[int, clients.Client], said: dict[int, Any], lost: set[int], clock: Clock
) -> Figures:
    """The rest of an attempt without those who are lost."""
    server, told = heard(server, {s: m for s, m in said.items() if s not in lost}, clock)
    if not told:  # some are missing: time is up
        at = time.process_time()
        server, actions = servers.step(server, servers.Close())
        clock.server += time.process_time() - at
        told = {a.slot: a.message for a in actions if isinstance(a, servers.Send)}
    own = Clock(server.terms.clients)
    answers = answered(dict(states), told, own)
    end = None
    for slot, message in answers.items():
        at = time.process_time()
        server, actions = servers.step(server, servers.From(slot, message))
        clock.server += time.process_time() - at
        end = next((a for a in actions if isinstance(a, servers.Revealed | servers.Failed)), end)
        if end is not None:
            break
    if not isinstance(end, servers.Revealed):
        raise SystemExit(f"the attempt failed: {end}")
    return {
        "client": statistics.median((clock.clients + own.clients)[list(answers)].tolist()), "server": clock.server,
        "survivors": len(end.survivors),
    }  # fmt: skip


# --- bounds -------------------------------------------------------------------------------------------------


def bounds(setting: Setting, rate: Rates, percent: int) -> tuple[float, float]:
    """CPU seconds that client and server cannot save."""
    withstand = setting.withstand
    degree, threshold = withstand.parameters
    client = (
        2 * rate.public
        + degree * (2 * rate.agreement + 3 * rate.derived + rate.sealed + rate.opened)
        + dealing(degree + 1, threshold)
        + (degree + 1) * rate.mask
    )
    lost = withstand.clients * percent // 100
    kept = withstand.clients - lost
    alike = degree + 1 == withstand.clients
    pairs = lost * degree * kept / max(withstand.clients - 1, 1)
    server = (
        kept * (rate.added + rate.mask + rate.derived)
        + pairs * (rate.agreement + rate.derived + rate.mask)
        + lost * rate.public
        + putting_together(kept, threshold, alike=alike)
        + putting_together(lost, threshold, alike=alike)
    )
    return client, server


def measured(setting: Setting, repeat: int) -> Iterator[Figures]:
    """Seconds, bounds and ratios of a setting: medians of some repetitions, and the ratio of the server's first, whose
    memory is fresh."""
    for same in zip(*(list(once(setting)) for _ in range(repeat)), strict=True):
        medians = {name: statistics.median(f[name] for f in same) for name in MEDIANS}
        yield same[0] | medians | {"server_first": same[0]["server_ratio"]}


MEDIANS = ("client", "client_bound", "client_ratio", "server", "server_bound", "server_ratio")


def once(setting: Setting) -> Iterator[Figures]:
    """One repetition."""
    rate = rates(setting.size, setting.bits)
    for found in attempts(setting):
        again = rates(setting.size, setting.bits)  # before and after: the machine's speed wanders
        mean = Rates(*((a + b) / 2 for a, b in zip(rate, again, strict=True)))
        client, server = bounds(setting, mean, found["drop"])
        degree, threshold = setting.withstand.parameters
        yield {
            "entries": setting.size, "bits": setting.bits, "clients": setting.withstand.clients, "degree": degree,
            "threshold": threshold, **found, "client_bound": client, "server_bound": server,
            "client_ratio": found["client"] / client, "server_ratio": found["server"] / server,
        }  # fmt: skip


HEAD = (
    f"{'entries':>9} {'n':>5} {'k':>4} {'t':>4} {'drop':>5} {'client ms':>10} {'bound':>8} {'ratio':>6} "
    f"{'server s':>9} {'bound':>8} {'ratio':>6} {'first':>6}"
)


def line(f: Figures) -> str:
    return (
        f"{f['entries']:9,} {f['clients']:5} {f['degree']:4} {f['threshold']:4} {f['drop']:4}% "
        f"{1e3 * f['client']:10.1f} {1e3 * f['client_bound']:8.1f} {f['client_ratio']:6.2f} "
        f"{f['server']:9.3f} {f['server_bound']:8.3f} {f['server_ratio']:6.2f} {f['server_first']:6.2f}"
    )


def full(count: int) -> Withstand:
    """So much that all have to mask with all."""
    share = 0.5 - 1 / count
    return Withstand(clients=count, corrupt=share, dropouts=share)


def settings() -> Iterator[Setting]:
    """Those of the targets: all with all among 100, and 1000 with a degree found for the share that drops out."""
    yield Setting(full(100), SIZE, width(100, 16, 1), (0, 10, 30))
    for percent in (0, 10, 30):
        found = Withstand(clients=1000, corrupt=CORRUPT, dropouts=percent / 100)
        yield Setting(found, SIZE, width(1000, 16, 1), (percent,))
    yield Setting(full(100), LARGE, width(100, 16, 1), (0, 10, 30))


def times(*chosen: Setting, repeat: int) -> list[Figures]:
    found = []
    print(HEAD)
    for setting in chosen:
        for figures in measured(setting, repeat):
            print(line(figures), flush=True)
            found.append(figures)
    return found


# --- beside others ------------------------------------------------------------------------------------------


def paper(counts: list[int], repeat: int) -> list[Figures]:
    """The times of Bonawitz et al. 2017 beside ours: 100,000 entries of 24 bits, all with all."""
    found = []
    for count in counts:
        print(f"\n{count} clients, 100,000 entries of 24 bits, all with all; seconds published (Java, 2017) and ours")
        for figures in measured(Setting(full(count), 100_000, 24, (0, 10, 30)), repeat):
            told = PUBLISHED[count]
            client, server = told["client"], told["server"][figures["drop"]]
            print(
                f"  {figures['drop']:2} % lost: client {client:.2f} / {figures['client']:.3f}, server {server:.1f} / "
                f"{figures['server']:.3f} (bound {figures['server_bound']:.3f}, ratio {figures['server_ratio']:.2f}, "
                f"in the first round {figures['server_first']:.2f})",
                flush=True,
            )
            found.append(figures | {"published_client": client, "published_server": server})
    return found


def flower(counts: list[int], repeat: int) -> list[Figures]:
    """Flower's SecAgg+ beside ours in the same run: as many clients, entries, shares, and the same threshold."""
    python = PEERS / ".venv-flower" / "bin" / "python"
    if not python.exists():
        print("\nno Flower here: python benchmarks/peers/install.py flower")
        return []
    found = []
    print("\n199,210 entries, all with all, nobody lost, CPU seconds: Flower's SecAgg+ and ours, one after the other")
    for count in counts:
        shares, threshold = count, full(count).parameters.threshold
        command = [str(python), str(PEERS / "flower_secagg.py"), *map(str, (count, SIZE, shares, threshold))]
        peer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for figures in measured(Setting(full(count), SIZE, width(count, 16, 1), (0,)), repeat):
            client, server = (peer[who] / figures[who] for who in ("client", "server"))
            print(
                f"  {count} clients: client {peer['client']:.3f} / {figures['client']:.4f} ({client:.0f}×), server "
                f"{peer['server']:.2f} / {figures['server']:.4f} ({server:.0f}×)", flush=True,
            )  # fmt: skip
            found.append(figures | {"flower_client": peer["client"], "flower_server": peer["server"]})
    return found


# --- bytes --------------------------------------------------------------------------------------------------


def bytes_of(count: int, entries: int, *, whole: bool) -> Figures:
    """What one client sends and receives where all mask with all, from its messages.

    Its peers' keys and parcels are random bytes of the right form, which changes no length. With ``whole`` its vector
    is really masked; otherwise it is packed as it is, which takes as many bytes.
    """
    bits = width(count, 16, 1)
    withstand = full(count)
    promise = promised(withstand, entries, bits)
    terms = messages.terms_for(
        promise, session=bytes(16), round=1, attempt=1, model=MODEL, graph=bytes(32), clients=count
    )
    state, actions = clients.begin(terms, owned(0, promise))
    others = messages.bits(np.arange(count) > 0)
    random = np.random.default_rng(0)
    roster = messages.Roster(
        others, random.integers(0, 256, (count - 1, 64)).astype(np.uint8), np.zeros((count - 1, 0), np.uint8)
    )
    sent, received = [actions[-1].message], [roster]
    state, actions = clients.step(state, roster)
    sent.append(actions[-1].message)
    delivery = messages.Delivery(others, random.integers(0, 256, (count - 1, 80)).astype(np.uint8))
    received.append(delivery)
    numbers = np.zeros(entries, word(bits))
    if whole:
        state, _ = clients.step(state, delivery)
        state, actions = clients.step(state, clients.Numbers((numbers,)))
        sent.append(actions[-1].message)
    else:
        sent.append(messages.Masked(packed(numbers, bits)))
    every = messages.bits(np.ones(count, bool))
    received.append(messages.Survivors(every, count))
    sent.append(messages.Shares(every, np.zeros((count, 32), np.uint8)))
    total = sum(map(messages.message_size, [*sent, *received])) + traffic.TERMS
    told = traffic.traffic(count - 1, entries, bits)
    if total != told.total:
        raise SystemExit(f"{total} bytes, and {told.total} by the figures")
    return {
        "clients": count, "entries": entries, "bytes": total, "published": traffic.published(count, entries, bits),
        "expansion": total / (2 * entries), "items": told._asdict(),
        "signed": traffic.traffic(count - 1, entries, bits, malicious=True)._asdict(),
    }  # fmt: skip


def all_bytes() -> list[Figures]:
    found = []
    print("\nbytes of one client, sent and received, all with all, 16 bits an entry")
    for count, entries, whole in ((2**10, 2**20, True), (2**14, 2**24, False)):
        f = bytes_of(count, entries, whole=whole)
        expansion = f["published"] / (2 * entries)
        items = ", ".join(f"{name} {value:,}" for name, value in f["items"].items() if value)
        print(
            f"  n={count}, m={entries:,}: {f['expansion']:.4f} times plain 16-bit values; published {expansion:.3f}; "
            f"ratio {f['bytes'] / f['published']:.4f}\n    {items}"
        )
        lying = sum(f["signed"].values())
        print(
            f"    against a server that lies: ratio {lying / f['published']:.4f}, of it identities "
            f"{f['signed']['identities']:,} and signatures {f['signed']['signatures']:,}", flush=True,
        )  # fmt: skip
        found.append(f)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="times,bytes,flower", help="some of times, bytes, flower")
    parser.add_argument("--flower", default="50,100", help="numbers of clients beside Flower's")
    parser.add_argument("--paper", default="", help="numbers of clients of the paper's table: 500,1000")
    parser.add_argument("--settings", default="0,1,2,3,4", help="which of the times: full 100, 1000 (three), large")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions, of which the medians are told")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    if any(os.environ.get(name) != "1" for name in THREADS):  # numpy reads them when it is loaded: begin anew
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | dict.fromkeys(THREADS, "1"))
    parts, found = options.parts.split(","), {}
    if "bytes" in parts:
        found["bytes"] = all_bytes()
    if "times" in parts:
        print()
        every = list(settings())
        chosen = [every[int(i)] for i in options.settings.split(",")]
        found["times"] = times(*chosen, repeat=options.repeat)
    if "flower" in parts:
        found["flower"] = flower([int(n) for n in options.flower.split(",")], options.repeat)
    if options.paper:
        found["paper"] = paper([int(n) for n in options.paper.split(",")], options.repeat)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
