"""The workloads on a GPU, through the public API and with default settings, beside what is wanted of one (H200 class).

    python benchmarks/gpu.py            # about five minutes; says so and ends if there is no GPU
    python benchmarks/gpu.py --quick

First every network is checked: a client's round on the GPU equals the CPU's within 10⁻⁵ relative for one local
step in float32. Then seconds a round in steady state: W1 to W4, and W5, a thousand convolutional networks at once,
also as client-steps a second. Every measurement is a process of its own (`foedus_round.py`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workloads

import foedus as fd

HERE = Path(__file__).resolve().parent
WANTED = {"W1": 0.005, "W2": 0.040, "W3": 0.0005, "W4": 0.002}  # seconds a round
WANTED_STEPS = 20_000  # client-steps a second of W5
TOLERANCE = 1e-5
ROUNDS = {"W1": 100, "W2": 40, "W3": 400, "W4": 60, "W5": 12}
LONGEST = 600  # seconds for one measurement


def one_step(name: str, device: str) -> np.ndarray[Any, Any]:
    """The model after one local step of a few clients of a workload, flat [parameter]."""
    import models

    chosen = workloads.workload(name)
    x, y = workloads.pool(chosen.image)
    clients = fd.Clients.pooled(fd.Examples.of(x, y), workloads.partition(chosen)[:8])
    task = fd.Task(model=models.NETWORKS[chosen.network], loss=models.loss)
    algorithm = fd.fedavg(fd.local_sgd(lr=workloads.LEARNING_RATE, steps=1, batch_size=workloads.BATCH_SIZE))
    executor = fd.executors.debug() if device == "cpu" else fd.executors.auto()
    with tempfile.TemporaryDirectory(prefix="foedus-gpu-") as folder:
        settings = fd.Settings(executor=executor, folder=f"{folder}/run", progress=False, device=device)
        run = fd.simulate(task, algorithm, clients, rounds=1, evaluation=fd.Evaluation(every=0), settings=settings)
        start = fd.simulate(
            task,
            algorithm,
            clients,
            rounds=0,
            settings=fd.Settings(folder=f"{folder}/start", progress=False, device="cpu"),
        )
    return run.weights.vector - start.weights.vector


def agreement(name: str) -> float:
    """How far a step on the GPU is from the CPU's, relative to its length."""
    ours, plain = one_step(name, "cuda"), one_step(name, "cpu")
    return float(np.linalg.norm(ours - plain) / np.linalg.norm(plain))


def measured(name: str, rounds: int) -> dict[str, Any]:
    """One workload's figures, from a process of its own."""
    command = [sys.executable, str(HERE / "foedus_round.py"), name, "--rounds", str(rounds), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=True, cwd=HERE)
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it works")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no GPU here: nothing to measure. Everything in foedus works without one.")
        return 0
    print(torch.cuda.get_device_name())
    faults = 0
    for name in ("W1", "W2", "W3"):
        apart = agreement(name)
        faults += apart > TOLERANCE
        print(f"{name}: one step differs from the CPU's by {apart:.1e} of its length (wanted {TOLERANCE:.0e})")
    for name, rounds in ROUNDS.items():
        figures = measured(name, 6 if asked.quick else rounds)
        seconds, steps = figures["seconds_per_round"], workloads.workload(name).steps
        wanted = f"{WANTED[name]:g} s" if name in WANTED else f"{WANTED_STEPS:,} client-steps a second"
        print(
            f"{name}: {seconds:.5f} s a round, {steps / seconds:,.0f} client-steps a second (wanted {wanted}); "
            f"{figures['executor']}, first round after {figures['start_to_first_round_s']:.1f} s"
        )
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
