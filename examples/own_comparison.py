import torch

from benchmarks.experiment import Experiment, Method, Outcome, Task
from demem.data import GroupedDataModule, GroupedTensors
from demem.module import Classifier


def points(size: int, agreement: float, seed: int) -> GroupedTensors:  # column 1 is a shortcut, clearer than the class
    y, x = torch.arange(size) % 2, torch.randn(size, 10, generator=torch.Generator().manual_seed(seed))
    shortcut = torch.where(torch.arange(size) < agreement * size, y, 1 - y)
    x[:, :2] += torch.stack([2 * y - 1, 6 * shortcut - 3], 1)
    return GroupedTensors(x, y, group=2 * y + shortcut)


def make_task() -> Task:
    def data(settings, seed, **kwargs):
        sets = points(2000, 0.95, 3 * seed), points(500, 0.5, 3 * seed + 1), points(2000, 0.5, 3 * seed + 2)
        return GroupedDataModule(*sets, seed=seed, **kwargs)

    def network(settings, **kwargs):
        return Classifier(torch.nn.Sequential(torch.nn.Linear(10, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), **kwargs)

    return Task("points", epochs=5, data=data, module=network)


def strong_decay(experiment: Experiment) -> Outcome:
    return Outcome(experiment.fit(experiment.module(weight_decay=0.1)).logits)


METHODS = [Method("strong_decay", tier="T0", selection="last epoch", run=strong_decay, held_out=("none", "iid", "val"))]
