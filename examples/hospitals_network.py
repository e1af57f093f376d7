"""Four hospitals that find tumours together: first simulated, then for real, between processes or machines.

    foedus simulate hospitals_network.py                          in one process
    foedus serve hospitals_network.py --minimum 4                 a server; prints how to join, with pin, token and task

and for each of the hospitals 0, 1, 2 and 3, on its own machine or all on this one:

    foedus join https://localhost:8765 --pin ... --token ... --approve ... \\
        --data hospitals_network.py:clients --part 0 --consent "Dr Weiss" --folder hospital0

Whatever is killed goes on when it is started again. Where the hospitals join in the order of their numbers, the model
that all of them get in the end has the bits of the one that is simulated with the executor ``debug``.
"""

import foedus as fd


def clients() -> fd.Clients:
    """Every hospital's patients, scaled by its own figures. A real one would read its own file here."""
    hospitals = fd.data.breast_cancer().partition(fd.data.iid(4), seed=0)
    return hospitals.map_fitted(fd.data.own_scaling())


federation = fd.Federation(
    task=fd.Task(fd.logistic(30, 2), metrics=[fd.accuracy]),
    algorithm=fd.fedavg(fd.local_sgd(lr=0.1, epochs=2, batch_size=16)),
    clients=clients,
    rounds=5,
)

if __name__ == "__main__":
    run = fd.simulate(federation.task, federation.algorithm, clients(), rounds=federation.rounds)
    print(run)
