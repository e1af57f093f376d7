"""FSVRG on sparse examples (Konečný, McMahan, Ramage, Richtárik 2016, arXiv 1610.02527).

Which sentences in Shakespeare's plays are questions? Logistic regression on the words alone (10,000 of them; a sentence
has 11), l2 = 1/n, every speaking role a client: 1,170 of them with 1 to 606 sentences. The optimum of all is computed
centrally; then FSVRG, federated averaging, distributed gradient descent and one-shot averaging are measured by how far
above the optimum's objective they are after each round. Step sizes are the best of a grid after ``TUNE`` rounds.

    python experiments/fsvrg.py                        # some minutes of one core
    python experiments/fsvrg.py --only FSVRG --rounds 10
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from outcome import document, figure_path, run_folder, store, table, wanted
from scipy.optimize import minimize

import foedus as fd

WORDS, TUNE, ROUNDS = 10_000, 20, 60  # rounds of communication; FSVRG needs two for an iteration
SHOWN = (10, 20, 30, 60)
WARM = 1e-3  # a suboptimality to reach


class Arm(NamedTuple):
    """An algorithm by its step size, the step sizes to try, and for how many rounds it runs at most."""

    make: Callable[[Any, float], fd.Algorithm]
    steps: tuple[float, ...]
    rounds: int = ROUNDS


def local(lr: float, epochs: int) -> Any:
    return fd.local_sgd(lr=lr, epochs=epochs, batch_size=10)


def one_shot(model: Any, penalty: float) -> fd.Algorithm:
    """Every client solves its own problem with a penalty of its own; the optima are averaged, once."""

    def visit(seen: Any) -> Any:
        own = yield fd.Consult(partial(solved_alone, size=len(seen.received), penalty=penalty))
        return fd.Contribution(own)

    return fd.Algorithm(client=local(1.0, 1), method=fd.Method(visit, f"one_shot({penalty:g})"))


ARMS = {
    "FSVRG": Arm(lambda model, step: fd.fsvrg(model, step=step), (16.0, 32.0, 64.0)),
    "FedAvg, 1 epoch": Arm(lambda model, step: fd.fedavg(local(step, 1)), (1.0, 3.0, 10.0)),
    "FedAvg, 5 epochs": Arm(lambda model, step: fd.fedavg(local(step, 5)), (0.3, 1.0, 3.0)),
    "Gradient descent": Arm(lambda model, step: fd.fedsgd(lr=step), (6.0, 9.0, 12.0)),
    "One-shot averaging": Arm(one_shot, (1e-3, 1e-2, 1e-1), 1),
}


# --- solving centrally, and one client's problem by itself ---------------------------------------------------


def minimum(model: Any, examples: Any, start: np.ndarray, extra: float = 0.0) -> Any:
    """The model's optimum on some examples by L-BFGS; ``extra`` is a penalty on the bias."""

    def both(w: np.ndarray) -> tuple[float, np.ndarray]:
        named = {"weight": w[:-1], "bias": w[-1:]}
        loss, found = model.gradient(named, examples.inputs, examples.targets)
        pull = found["bias"] + extra * w[-1:]
        return float(loss) + extra / 2 * float(w[-1] ** 2), np.append(found["weight"], pull)

    tight = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-16, "gtol": 1e-9, "maxcor": 30}
    return minimize(both, start, jac=True, method="L-BFGS-B", options=tight)


def solved_alone(examples: Any, *, size: int, penalty: float) -> np.ndarray:
    """A client's own optimum, [parameter], over the words that it uses; all others have a weight of 0."""
    indices, values = examples.inputs
    words, places = np.unique(indices, return_inverse=True)
    model = fd.sparse_logistic(len(words), l2=penalty, dtype="float64")
    own = fd.Examples((places.reshape(indices.shape), values), examples.targets)
    found = minimum(model, own, np.zeros(len(words) + 1), extra=penalty).x
    whole = np.zeros(size)
    whole[words], whole[-1] = found[:-1], found[-1]
    return whole


# --- runs ---------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """The model, the clients (whose central examples are the training ones: the objective), the test set, and the
    objective at the optimum and at zero."""

    model: Any
    clients: fd.Clients
    test: Any
    best: float
    first: float
    optimum: Mapping[str, Any]


def problem() -> Problem:
    data = fd.data.shakespeare_questions(words=WORDS)
    model = fd.sparse_logistic(WORDS, l2=1 / len(data.train), dtype="float64")
    found = minimum(model, data.train, np.zeros(WORDS + 1))
    print(f"optimum {found.fun:.10f} after {found.nfev} evaluations, {data.clients()!r}", flush=True)
    named = {"weight": found.x[:-1], "bias": found.x[-1:]}
    return Problem(
        model, data.clients().with_test(data.train), data.test, float(found.fun), float(np.log(2)), named
    )  # fmt: skip


def above(run: fd.Run, at: Problem) -> list[float]:
    """How far above the optimum after each round; first before any."""
    return [at.first - at.best, *(m["central"]["loss"] - at.best for m in run.metrics)]


def wrong(model: Any, parameters: Mapping[str, Any], test: Any) -> float:
    return float(np.mean((model.predict(parameters, *test.inputs) > 0) != test.targets))


def simulate(name: str, step: float, at: Problem, rounds: int) -> fd.Run:
    """One run; one of fewer rounds goes on."""
    arm = ARMS[name]
    return fd.simulate(
        fd.Task(at.model), arm.make(at.model, step), at.clients, rounds=min(rounds, arm.rounds), seed=0,
        settings=fd.Settings(
            executor=fd.executors.debug(), progress=False, folder=run_folder("fsvrg", f"{name} {step:g}"),
        ),
    )  # fmt: skip


def tuned(name: str, step: float, at: Problem) -> float:
    """How far above the optimum a step size is after the tuning rounds; infinity where it diverged."""
    path = run_folder("fsvrg", f"{name} {step:g}")
    done = (path / "metrics.jsonl").exists() and len(fd.read_run(path).metrics) >= min(TUNE, ARMS[name].rounds)
    run = fd.read_run(path) if done else simulate(name, step, at, TUNE)
    end = above(run, at)[min(TUNE, ARMS[name].rounds)]
    return end if np.isfinite(end) else float("inf")


def measure(name: str, at: Problem, rounds: int) -> dict[str, Any]:
    ends = {step: tuned(name, step, at) for step in ARMS[name].steps}
    step = min(ends, key=lambda s: ends[s])
    run = simulate(name, step, at, rounds)
    curve = above(run, at)
    print(f"{name}: {ends}, {curve[-1]:.3g}", flush=True)
    return {
        "step": step,
        "tried": {f"{s:g}": float(f"{e:.4g}") for s, e in ends.items()},
        "curve": [float(f"{c:.6g}") for c in curve],
        "bytes_up": int(np.mean([m["bytes_up"] for m in run.metrics])) // len(at.clients),
        "test_error": round(wrong(at.model, run.model, at.test), 4),
    }


# --- memory -------------------------------------------------------------------------------------------------


def footprint() -> dict[str, int]:
    """Bytes: what the sparse examples take, what dense ones would, and the peak that a run adds to the examples."""
    data = fd.data.shakespeare_questions(words=WORDS)
    clients = data.clients()
    model = fd.sparse_logistic(WORDS, l2=1 / len(data.train), dtype="float64")
    tracemalloc.start()
    settings = fd.Settings(executor=fd.executors.debug(), progress=False, folder=run_folder("fsvrg", "memory"))
    fd.simulate(fd.Task(model), fd.fsvrg(model, step=1.0), clients, rounds=2, settings=settings)
    peak = tracemalloc.get_traced_memory()[1]
    entries = int((data.train.inputs[1] != 0).sum())
    dense = len(data.train) * WORDS * 4
    return {"examples": data.train.nbytes, "entries": entries, "dense": dense, "peak_of_a_run": peak}


def measured_apart() -> dict[str, int]:
    """The footprint in a process of its own, so that nothing else counts; with the process's peak."""
    code = (
        "import json, resource, fsvrg; found = fsvrg.footprint(); "
        "found['peak_of_the_process'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; "
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=sys.path[0], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# --- what comes out -----------------------------------------------------------------------------------------


def lines(found: Mapping[str, Any]) -> list[list[Any]]:
    rows = []
    for name, f in found.items():
        curve = f["curve"]
        reached = next((i for i, c in enumerate(curve) if c < WARM), None)
        ends = [curve[i] if i < len(curve) else None for i in (1, *SHOWN)]
        rows.append([name, f["step"], *ends, reached, f"{f['test_error']:.2%}", f["bytes_up"] // 1000])
    return rows


def draw(found: Mapping[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name, f in found.items():
        curve = np.array(f["curve"])
        if len(curve) == 2:
            axis.axhline(curve[-1], label=f"{name} (one round)", color="grey", ls="--", lw=1)
        elif name == "FSVRG":
            axis.plot(np.arange(0, len(curve), 2), curve[::2], label=name, marker=".", lw=1.4)
        else:
            axis.plot(curve, label=name, lw=1.4)
    axis.set(xlabel="round of communication (FSVRG: two an iteration)", ylabel="objective above the optimum")
    axis.set(yscale="log", title="Which sentences are questions? 1,170 roles, 10,000 words")
    axis.legend(loc="center right", bbox_to_anchor=(1.0, 0.42))
    figure.tight_layout()
    figure.savefig(figure_path("fsvrg"), dpi=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help=f"some of {', '.join(ARMS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of communication")
    options = parser.parse_args()
    at = problem()
    found = {name: measure(name, at, options.rounds) for name in ARMS if wanted(name, options.only)}
    header = (
        "algorithm",
        "step",
        *(f"after {r}" for r in (1, *SHOWN)),
        f"rounds to {WARM:g}",
        "test error",
        "kB up",
    )
    print(table(header, lines(found)))
    if len(found) < len(ARMS) or options.rounds != ROUNDS:
        return
    memory = measured_apart()
    print(memory)
    document("fsvrg", table(header, lines(found)))
    about = {"words": WORDS, "clients": len(at.clients), "examples": len(at.clients.pooled_examples())}
    error = round(wrong(at.model, at.optimum, at.test), 4)
    store("fsvrg", about | {"optimum": at.best, "test_error": error, "memory": memory, "found": found})
    draw(found)


if __name__ == "__main__":
    main()
