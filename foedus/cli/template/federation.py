"""NAME: handwritten digits on ten nodes, each with mostly one digit.

    foedus simulate federation.py            run it
    foedus compare federation.py             beside centralised and local-only training
    foedus simulate federation.py --help     every field has a flag

or, in Python: ``python federation.py``
"""

import torch
from torch import nn

import foedus as fd


class Net(nn.Module):
    """The model: replace it with your own. [B, 1, 8, 8] -> [B, 10]"""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.layers(x)
        return scores


task = fd.Task(model=Net, loss=nn.functional.cross_entropy, metrics=[fd.accuracy])

# The data: 1,438 digits, 80 % of one kind on each node. README.md says how to bring your own.
clients = fd.data.digits().partition(fd.data.by_class(10, share=0.8), seed=0)

algorithm = fd.fedavg(fd.local_sgd(lr=0.1, epochs=2, batch_size=10))

federation = fd.Federation(task=task, algorithm=algorithm, clients=clients, rounds=20)

if __name__ == "__main__":
    run = fd.simulate(**vars(federation))
    run.plot()
    print(run)
