"""Four hospitals that find tumours together, and show the server no update: it adds up ciphertexts.

Once, each of them tells the others its identity (`foedus silos identity --folder hospital0`), all write `roster.txt`,
and each runs this until it says that all have the same key:

    foedus silos agree shared --name hospital0 --roster roster.txt --session tumours --folder hospital0

    foedus serve hospitals_encrypted.py --minimum 4      a server, which has no key; prints pin, token and task

and for each of the hospitals 0, 1, 2 and 3, on its own machine or all on this one:

    foedus join https://localhost:8765 --pin ... --token ... --approve ... \\
        --data hospitals_encrypted.py:clients --part 0 --consent "Dr Weiss" --folder hospital0

Run by itself, it is simulated with a key of its own, and ends with the same bits.
"""

import foedus as fd


def clients() -> fd.Clients:
    """Every hospital's patients, scaled by its own figures. A real one would read its own file here."""
    hospitals = fd.data.breast_cancer().partition(fd.data.iid(4), seed=0)
    return hospitals.map_fitted(fd.data.own_scaling())


def algorithm(key=None) -> fd.Algorithm:
    """Clipped, encrypted, and added up: without a key, as on the server and in what the hospitals approve."""
    unseen = fd.chain(fd.clip(1.0), fd.encrypted(4, key=key))
    return fd.fedavg(fd.local_sgd(lr=0.1, epochs=2, batch_size=16), aggregator=unseen)


task = fd.Task(fd.logistic(30, 2), metrics=[fd.accuracy])
federation = fd.Federation(task=task, algorithm=algorithm(), clients=clients, rounds=5)

if __name__ == "__main__":
    print(fd.simulate(task, algorithm(fd.silo_key()), clients(), rounds=federation.rounds))
