"""A simulated fleet of phones: some are slow, some get lost, the round closes at a deadline.

Nothing sleeps: hours of the fleet pass in a second of yours. What a run cost is in its metrics and in costs.jsonl.
"""

import numpy as np

import foedus as fd
from foedus.sim.world import Device


def phone(draw: np.random.Generator) -> Device:
    """One phone of the fleet, from its own random generator: old or new, on a good network or a bad one."""
    old = draw.random() < 0.3
    return Device(
        speed=5.0 if old else 40.0,  # training examples a second
        download=float(draw.uniform(2e5, 5e6)),  # bytes a second
        upload=float(draw.uniform(5e4, 1e6)),
        watts=2.5,
        joules_per_byte=5e-6,
        dropout=0.08,
    )


task = fd.Task(fd.logistic(64, classes=10), metrics=[fd.accuracy])
clients = fd.data.digits().partition(fd.data.dirichlet(200, alpha=0.5), seed=0)
algorithm = fd.fedavg(fd.local_sgd(lr=0.5, epochs=5, batch_size=5))
world = fd.World(device=phone, deadline=10.0, over_selection=1.3, minimum=5)

if __name__ == "__main__":
    settings = fd.Settings(world=world)
    run = fd.simulate(task, algorithm, clients, cohort=20, rounds=30, settings=settings)
    print(run)
    last = run.metrics[-1]["simulated"]
    lost = sum(line["simulated"]["dropped"] + line["simulated"]["late"] for line in run.metrics)
    asked = sum(line["cohort"] for line in run.metrics)
    print(f"{last['elapsed_seconds'] / 60:.1f} simulated minutes; {lost} of {asked} answers lost or late")
    print(f"{sum(line['simulated']['energy_joules'] for line in run.metrics):.0f} J on all phones together")
