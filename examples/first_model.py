"""A PyTorch model of your own, federated over ten nodes that each hold mostly one digit."""

import torch
from torch import nn

import foedus as fd


class Net(nn.Module):
    """A small convolutional network: [B, 1, 8, 8] -> [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.scores = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.convolution(x)), 2)
        return self.scores(x.flatten(1))


task = fd.Task(model=Net, loss=nn.functional.cross_entropy, metrics=[fd.accuracy])
clients = fd.data.digits().partition(fd.data.by_class(10, share=0.8), seed=0)
algorithm = fd.fedavg(fd.local_sgd(lr=0.1, epochs=2, batch_size=10))

if __name__ == "__main__":
    run = fd.simulate(task, algorithm, clients, rounds=15)
    run.plot()
    print(run)
    print("rounds to 85 %:", run.rounds_to("accuracy", 0.85))

    model = run.model  # the trained module, in evaluation mode
    image = clients.central_test.inputs[0][:1]
    print("the first test image shows a", int(model(torch.from_numpy(image)).argmax()))
