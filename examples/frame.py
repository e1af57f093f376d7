"""A pandas frame with a column that says whose a row is: does it pay three small clinics to learn together?

The rows are measurements of tumours (scikit-learn's breast-cancer data). The clinics are made up: ten patients
each, and unlike each other as clinics are. So few patients are a matter of luck: try other seeds.
"""

import numpy as np
import pandas as pd
from rich.console import Console

import foedus as fd

FEATURES = 30


def table(examples: fd.Examples, columns: tuple[str, ...]) -> pd.DataFrame:
    """What lies in somebody's database: one row per tumour."""
    return pd.DataFrame(examples.inputs[0], columns=columns).assign(benign=examples.targets)


def clinics(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """30 of the rows, given to three clinics by the size of the tumour, with some disorder."""
    frame = frame.sample(30, random_state=seed)
    disorder = np.random.default_rng(seed).normal(size=len(frame))
    order = (frame["mean radius"].rank() + 5 * disorder).rank().to_numpy()
    return frame.assign(clinic=np.array(["north", "south", "west"])[np.ceil(order / 10).astype(int) - 1])


tumours = fd.data.breast_cancer()
train, test = table(tumours.train, tumours.columns), table(tumours.test, tumours.columns)
frame = clinics(train)

clients = fd.data.from_frame(frame, target="benign", client="clinic", test=test.assign(clinic="north")).clients()
scaling = fd.data.federated_scaling(clients)  # from sums of statistics: nobody shows a row
clients = clients.map(scaling.apply)

task = fd.Task(fd.logistic(FEATURES, classes=2), metrics=[fd.accuracy, fd.auroc])
algorithm = fd.fedavg(fd.local_sgd(lr=0.05, epochs=2, batch_size=8))

if __name__ == "__main__":
    comparison = fd.compare(task, algorithm, clients, rounds=20)
    Console().print(comparison.table())
    comparison.plot()
