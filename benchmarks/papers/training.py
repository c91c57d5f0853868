"""How the small networks of the first paper's series are trained and judged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def shuffled(y: Tensor, share: float, seed: int, classes: int = 2) -> Tensor:
    """Labels, a share of them redrawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    redrawn = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    y = y.clone()
    y[redrawn] = torch.randint(classes, (len(redrawn),), generator=generator)
    return y


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    batch: int,
    seed: int,
    lr: float = 1e-3,
    penalty: float = 0.0,
    stop: float = 0.999,
    kind: type[torch.optim.Optimizer] = torch.optim.Adam,
) -> tuple[float, int]:
    """Train until the accuracy of an epoch reaches ``stop``; returns that of training and the number of epochs.

    Args:
        model: gives logits.
        x, y: inputs and classes of the training examples.
        epochs: at most.
        batch, seed: of the batches that are drawn.
        lr: learning rate.
        penalty: of the squares of all parameters.
        stop: accuracy over an epoch, while training.
        kind: of optimizer.
    """
    optimizer = kind(model.parameters(), lr=lr)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(seed)
    accuracy, epoch = 0.0, 0
    while epoch < epochs and accuracy < stop:
        correct, epoch = 0, epoch + 1
        for part in torch.randperm(len(x), generator=generator).split(batch):
            logits = model(x[part])
            loss = F.cross_entropy(logits, y[part])
            correct += int((logits.argmax(1) == y[part]).sum())
            if penalty:
                loss = loss + penalty * torch.stack([p.square().sum() for p in model.parameters()]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = correct / len(x)
    return accuracy, epoch


@torch.no_grad()
def accuracy_of(model: nn.Module, x: Tensor, y: Tensor, batch: int | None = None) -> float:
    """Fraction of the examples that the network gets right, read ``batch`` at once, or all."""
    answers = torch.cat([model(part).argmax(1) for part in x.split(batch or len(x))])
    return float((answers == y).float().mean())
