"""How fast what stands between training and averaging is: stages, robust rules, rotation, and their share of a round.

    python benchmarks/stages.py                          # everything, about five minutes
    python benchmarks/stages.py --only eden,rotate       # some stages
    python benchmarks/stages.py --sizes 199210           # one size
    python benchmarks/stages.py --parts stages,rotation  # some of: stages, rotation, robust, memory, round, privacy
    python benchmarks/stages.py --json out.json          # also keep every figure

One core, one client's update: *encode* is what the client does, *merge* what the server does with each message (admit
it and add it to the sum), *decode* what it does once a round. GB/s are those of the plain float32 update (4·d bytes),
beside the speed at which this machine copies memory in the same run (bytes read + bytes written). Best of several
tries: other programs only ever make things slower. `round` trains W1 (see README.md) with several aggregators, again
and again in turn; `privacy` with and without noise, and says what each part of the noise costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import foedus as fd
from foedus.core.quantise import signs
from foedus.core.rotation import transform
from foedus.core.values import SERVER, Context, Update
from foedus.tree import Layout

SIZES = (199_210, 1_663_370, 2**24)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PARTS = ("stages", "rotation", "robust", "memory", "round", "privacy")
CLIENTS, ROBUST_SIZE = 100, 199_210
MANY = 10_000
ROUNDS, SKIP = 16, 4
GATED = "gate of norms, clip, mean"
Figures = dict[str, Any]


def layout_of(size: int) -> Layout:
    """Of a model with one large matrix and its bias, of so many parameters in all."""
    rows = 512 if size > 512 * 64 else 8
    columns = size // rows - 1
    rest = size - rows * columns
    return Layout(("w", "b"), ((rows, columns), (rest,)), ("float32",) * 2)


def chains() -> dict[str, Any]:
    """Everything that is measured, by name."""
    stages = [
        fd.clip(1.0),
        fd.rotate(),
        fd.random_mask(1 / 16),
        fd.subsample(1 / 16),
        fd.rand_k(1 / 16),
        fd.top_k(0.01),
        *(fd.quantise(bits) for bits in (1, 2, 3, 8)),
        fd.quantise(2, scale=4.0),
        fd.qsgd(4),
        fd.drive(),
        *(fd.eden(bits) for bits in (2, 4, 8)),
        signs(),
        fd.low_rank(8),
        fd.power_sgd(4),
        fd.matrices(fd.quantise(2)),
    ]
    found = {stage.label: fd.chain(stage, fd.mean()) for stage in stages}
    rows = {
        "rotate, quantise(2)": fd.chain(fd.rotate(), fd.quantise(2), fd.mean()),
        "rotate, quantise(2, scale)": fd.chain(fd.rotate(), fd.quantise(2, scale=4.0), fd.mean()),
        "quantise(2), entropy": fd.chain(fd.quantise(2), fd.entropy(), fd.mean()),
        "qsgd(4), entropy": fd.chain(fd.qsgd(4), fd.entropy(), fd.mean()),
        "top_k(0.01), eden(4)": fd.chain(fd.top_k(0.01), fd.eden(4), fd.mean()),
        "sign_majority()": fd.sign_majority(),
    }
    return {"mean()": fd.mean()} | found | rows


def best(action: Callable[[], Any], seconds: float = 0.6, most: int = 20) -> float:
    """The shortest of some runs, in seconds."""
    found, begin = [], time.perf_counter()
    while len(found) < 3 or (len(found) < most and time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return min(found)


def bandwidth() -> float:
    """Bytes a second that one core reads and writes when it copies 256 MB."""
    source = np.ones(2**26, np.float32)
    goal = np.empty_like(source)
    return 2 * source.nbytes / best(lambda: np.copyto(goal, source))


# --- stages -------------------------------------------------------------------------------------------------


def stage(rule: Any, size: int) -> Figures:
    """Milliseconds of each part of one aggregator at one size, and bits an entry on the wire."""
    vector = np.random.default_rng(0).standard_normal(size, np.float32)
    context = Context(0, 1, 0, layout_of(size), size)
    message = rule.encode(Update(vector, 10.0), context)
    total = rule.merge(*({n: a.copy() for n, a in rule.admit(message, context).items()} for _ in range(2)))
    server = context._replace(client=SERVER)
    times = {
        "encode": best(lambda: rule.encode(Update(vector, 10.0), context)),
        "merge": best(lambda: rule.merge(total, rule.admit(message, context))),
        "decode": best(lambda: rule.decode({}, total, server)),
    }
    return {name: 1e3 * t for name, t in times.items()} | {
        "gb_s": 4 * size / sum(times.values()) / 1e9,
        "encode_gb_s": 4 * size / times["encode"] / 1e9,
        "bits": 8 * sum(a.nbytes for a in message.values()) / size,
    }


def stages(sizes: list[int], only: list[str]) -> Iterator[Figures]:
    columns = [
        ("d", 10),
        ("encode ms", 10),
        ("merge ms", 9),
        ("decode ms", 10),
        ("GB/s", 6),
        ("encode GB/s", 12),
        ("bits", 6),
    ]
    print("\n" + " ".join([f"{'stage':28}", *(f"{name:>{width}}" for name, width in columns)]))
    for size in sizes:
        for name, rule in chains().items():
            if only and not any(part in name for part in only):
                continue
            f = stage(rule, size)
            print(
                f"{name:28} {size:10,} {f['encode']:10.2f} {f['merge']:9.2f} {f['decode']:10.2f} {f['gb_s']:6.2f} "
                f"{f['encode_gb_s']:12.2f} {f['bits']:6.2f}",
                flush=True,
            )
            yield {"stage": name, "size": size} | f


def rotation() -> Figures:
    """Milliseconds of the Walsh–Hadamard transform alone."""
    found = {}
    for bits in (18, 21, 24):
        vector = np.random.default_rng(0).standard_normal(2**bits, np.float32)
        found[f"2^{bits}"] = 1e3 * best(lambda v=vector: transform(v), seconds=2, most=60)
    print("\nWalsh–Hadamard transform, float32: " + ", ".join(f"{n} {t:.2f} ms" for n, t in found.items()))
    return found


# --- robust rules and memory --------------------------------------------------------------------------------


def rules() -> list[Any]:
    """As many attackers as a fifth of the clients are borne."""
    few = CLIENTS // 5
    picky = [fd.krum(few), fd.multi_krum(few), fd.bulyan(few), fd.dnc(few), fd.fltrust(0)]
    return [fd.mean(), fd.median(), fd.trimmed_mean(0.2), fd.geometric_median(), fd.centred_clipping(10.0), *picky]


def robust() -> Iterator[Figures]:
    """Seconds and peak memory of merging and deciding over a hundred updates."""
    vectors = np.random.default_rng(0).standard_normal((CLIENTS, ROBUST_SIZE), np.float32)
    print(
        f"\n{CLIENTS} updates of {ROBUST_SIZE:,} ({vectors.nbytes / 1e6:.0f} MB): seconds to merge and decide, peak MB"
    )
    for rule in rules():
        seconds = best(lambda rule=rule: decided(rule, vectors), seconds=4, most=3)
        tracemalloc.start()
        decided(rule, vectors)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        print(f"{rule.label:28} {seconds:8.3f} {peak:9.1f}", flush=True)
        yield {"rule": rule.label, "seconds": seconds, "peak_mb": peak}


def decided(rule: Any, vectors: np.ndarray) -> np.ndarray:
    """The update of all, merged as the simulator does: each message is merged when it comes."""
    size, total = vectors.shape[1], None
    for client, vector in enumerate(vectors):
        context = Context(0, 1, client, layout_of(size), size)
        message = rule.admit(rule.encode(Update(vector, 10.0), context), context)
        total = message if total is None else rule.merge(total, message)
    found, _ = rule.decode(rule.init(layout_of(size)), total, Context(0, 1, SERVER, layout_of(size), size))
    return np.asarray(found)


def memory() -> Figures:
    """Peak memory of a mean over ten and over ten thousand clients: it must not grow."""
    found = {}
    for clients in (10, MANY):
        rule, vector, total = fd.mean(), np.ones(ROBUST_SIZE, np.float32), None
        tracemalloc.start()
        for client in range(clients):
            message = rule.encode(Update(vector, 1.0), Context(0, 1, client, size=ROBUST_SIZE))
            total = message if total is None else rule.merge(total, message)
        found[str(clients)] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    told = ", ".join(f"{n} clients {peak:.1f} MB" for n, peak in found.items())
    print(f"\npeak memory of a mean of 199,210 parameters: {told}")
    return found


# --- a round ------------------------------------------------------------------------------------------------


def rounds(turns: int) -> Iterator[Figures]:
    """What aggregators cost in W1."""
    yield from compared(aggregators(), turns)


def compared(rules: list[tuple[str, Any]], turns: int) -> Iterator[Figures]:
    """Medians of W1's rounds with several aggregators, as ratios to the first one's rounds of the same turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in rules}
    for _ in range(turns):
        for name, rule in rules:
            found[name].append(round_costs(rule, fd.Gate(max_norm=100.0) if name == GATED else fd.Gate()))
    plain = np.array(found[rules[0][0]])
    print(f"\nW1, {turns} turns; medians, above the plain rounds of the same turn: seconds by the clock, of processors")
    for name, rows in found.items():
        clock, cpu = (np.median(np.array(rows) / plain, 0) - 1).tolist()
        told = f"{np.median(rows, 0)[0]:8.4f} {100 * clock:+6.1f} %   {np.median(rows, 0)[1]:8.4f} {100 * cpu:+6.1f} %"
        print(f"{name:40} {told}", flush=True)
        yield {"aggregator": name, "seconds": rows, "clock_over_plain": clock, "cpu_over_plain": cpu}


def aggregators() -> list[tuple[str, Any]]:
    """Name and aggregator; the first is what the others are compared with."""
    return [
        ("mean()", fd.mean()),
        ("clip, mean", fd.chain(fd.clip(10.0), fd.mean())),
        (GATED, fd.chain(fd.clip(10.0), fd.mean())),
        ("median", fd.median()),
        ("rotate, quantise(2), mean", fd.chain(fd.rotate(), fd.quantise(2), fd.mean())),
        ("rotate, quantise(2, scale), mean", fd.chain(fd.rotate(), fd.quantise(2, scale=0.1), fd.mean())),
        ("eden(2), mean", fd.chain(fd.eden(2), fd.mean())),
    ]


def privacy(turns: int) -> Iterator[Figures]:
    """What noise costs in W1, and milliseconds of each part."""
    for name, ms in itemised():
        print(f"{name:60} {ms:8.3f} ms", flush=True)
        yield {"part": name, "ms": ms}
    yield from compared([("mean()", fd.mean()), *private_rules()], turns)


def private_rules() -> list[tuple[str, Any]]:
    """The mechanisms, for a cohort of ten."""
    return [
        ("central", fd.privacy.central(clip=1.0, noise_multiplier=1.0, cohort=10)),
        ("adaptive", fd.privacy.adaptive(noise_multiplier=1.0, cohort=10)),
        ("local", fd.chain(fd.privacy.local(clip=1.0, noise_multiplier=1.0), fd.mean())),
    ]


def itemised() -> Iterator[tuple[str, float]]:
    """Milliseconds of each part of central noise, for ten updates of W1's size."""
    from foedus.privacy.mechanisms import grid, on_grid
    from foedus.privacy.noise import discrete_gaussian, known_to_all_who_know_the_seed, system

    size = ROBUST_SIZE
    rng, rule = np.random.default_rng(0), fd.privacy.central(clip=1.0, noise_multiplier=1.0, cohort=10)
    vectors = [rng.standard_normal(size, np.float32) / 100 for _ in range(10)]
    context = Context(0, 1, 0, layout_of(size), size, secret=known_to_all_who_know_the_seed)
    step, updates, contexts = grid(1.0, 1.0, size), [Update(v, 600.0) for v in vectors], [context] * 10
    yield "plain mean: sum of ten updates", 1e3 * best(lambda: fd.mean().shortcut(updates, contexts))
    yield "central: clip and sum of ten updates", 1e3 * best(lambda: rule.shortcut(updates, contexts))
    yield "clip one update, onto the grid", 1e3 * best(lambda: on_grid(vectors[0], 1.0, step))
    for name, secret in (("counted", known_to_all_who_know_the_seed), ("the operating system's", system)):
        told = context._replace(secret=secret)
        yield f"random words, {name}", 1e3 * best(lambda told=told: told.secret(told, "x", vectors[0], size))
        yield (
            f"noise, words {name}",
            1e3 * best(lambda told=told: discrete_gaussian(told, "x", vectors[0], sigma=1 / step)),
        )
    total = rule.shortcut(updates, contexts)
    plain = fd.mean().shortcut(updates, contexts)
    yield "plain mean: decode", 1e3 * best(lambda: fd.mean().decode({}, plain, context))
    yield "central: decode, with noise", 1e3 * best(lambda: rule.decode({}, total, context))


class Ends:
    """A sink that notes when rounds end."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.cpu: list[float] = []

    def open(self, folder: Any, configuration: Any) -> Ends:  # noqa: ARG002
        return self

    def write(self, round: int, figures: Any, *, at: float) -> None:  # noqa: ARG002
        self.at.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def close(self) -> None: ...


def round_costs(rule: Any, gate: fd.Gate) -> tuple[float, float]:
    """Seconds of a round by the clock, and of all processors together, which others that use them change less."""
    ends = trained(rule, gate)
    return tuple(statistics.median(np.diff(each[SKIP:]).tolist()) for each in (ends.at, ends.cpu))


def trained(rule: Any, gate: fd.Gate) -> Ends:
    """When W1's rounds ended."""
    import foedus_round  # needs torch
    import workloads

    chosen, ends = workloads.WORKLOADS["W1"], Ends()
    local = fd.local_sgd(lr=workloads.LEARNING_RATE, epochs=1, batch_size=workloads.BATCH_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        settings = fd.Settings(folder=f"{folder}/run", progress=False, sinks=[ends])
        fd.simulate(
            foedus_round.torch_task(chosen),
            fd.fedavg(local, aggregator=rule, gate=gate),
            foedus_round.population(chosen),
            cohort=chosen.cohort,
            rounds=ROUNDS,
            evaluation=fd.Evaluation(every=0),
            settings=settings,
        )
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of stages' names, separated by commas")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of parameters")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--turns", type=int, default=7, help="how often `round` and `privacy` try each aggregator")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    if any(os.environ.get(name) != "1" for name in THREADS):  # numpy reads them when it is loaded: begin anew
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | dict.fromkeys(THREADS, "1"))
    parts = options.parts.split(",")
    found: Figures = {"bandwidth_gb_s": bandwidth() / 1e9}
    print(f"memory bandwidth, one core, copying: {found['bandwidth_gb_s']:.1f} GB/s")
    if "rotation" in parts:
        found["rotation_ms"] = rotation()
    if "stages" in parts:
        only = [part.strip() for part in options.only.split(",") if part.strip()]
        found["stages"] = list(stages([int(s) for s in options.sizes.split(",")], only))
    if "robust" in parts:
        found["robust"] = list(robust())
    if "memory" in parts:
        found["memory_mb"] = memory()
    if "round" in parts:
        found["rounds"] = list(rounds(options.turns))
    if "privacy" in parts:
        found["privacy"] = list(privacy(options.turns))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
