"""Change how often a DataLoader draws each training example, without replacing the loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler
from torch.utils.data.distributed import DistributedSampler

MULTINOMIAL_LIMIT = 2**24  # categories of torch.multinomial


class ReweightedSampler(Sampler[int]):
    """Draws positions with replacement, in proportion to weights; every process takes its own share of the same draw.

    Args:
        weights: ``(S,)`` for the positions of the data set.
        num_samples: drawn by each process in an epoch.
        rank, world: this process, and how many there are.
        seed: of the draw, together with the epoch.
    """

    def __init__(self, weights: Tensor, num_samples: int, rank: int = 0, world: int = 1, seed: int = 0) -> None:
        self.weights, self.num_samples = weights.double().cpu(), num_samples
        self.rank, self.world, self.seed, self.epoch = rank, world, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        drawn = draw(self.weights, self.num_samples * self.world, generator)[self.rank :: self.world]
        return (position for part in torch.split(drawn, 2**16) for position in part.tolist())


def draw(weights: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw positions with replacement, in proportion to weights, of which there may be any number.

    Args:
        weights: ``(S,)`` float64, non-negative.
        size: number of draws.
        generator: source of the draw.

    Returns:
        ``(size,)`` int64.

    Example:
        >>> drawn = draw(torch.tensor([1.0, 0.0, 3.0]).double(), 1000, torch.Generator().manual_seed(0))
        >>> torch.bincount(drawn)
        tensor([254,   0, 746])
    """
    if len(weights) <= MULTINOMIAL_LIMIT:
        return torch.multinomial(weights, size, replacement=True, generator=generator)
    upper = weights.cumsum(0)  # position i is drawn by uniform numbers from upper[i − 1] up to, without, upper[i]
    uniform = torch.rand(size, dtype=torch.float64, generator=generator) * upper[-1]
    last = int(weights.nonzero()[-1])  # a product may be rounded up to the sum
    return torch.searchsorted(upper, uniform, right=True).clamp_max(last)


def shuffles(loader: DataLoader[Any]) -> bool:
    """Whether the loader shuffles by a sampler that is known, and so may be drawn from otherwise.

    >>> shuffles(DataLoader([1, 2, 3], shuffle=True)), shuffles(DataLoader([1, 2, 3]))
    (True, False)
    """
    sampler = getattr(loader.batch_sampler, "sampler", None)
    return type(sampler) in (RandomSampler, DistributedSampler) and bool(getattr(sampler, "shuffle", True))


def reweight(
    loader: DataLoader[Any],
    positions: Tensor,
    weights: Tensor,
    trainer: pl.Trainer,
    seed: int,
    never: Tensor | None = None,
) -> Callable[[], None] | None:
    """Put a :class:`ReweightedSampler` in the loader's batch sampler, from the next epoch's iterator on.

    Args:
        loader: of the training data.
        positions: ``(S,)`` in the data set; all others get the mean weight.
        weights: ``(S,)`` of those positions.
        trainer: of the run.
        seed: see :class:`ReweightedSampler`.
        never: positions that are not drawn.

    Returns:
        A function that puts the loader's own sampler back; or ``None``, with nothing changed, if the loader does not
        shuffle by a sampler that is known (a sampler of the user's own is not overruled).
    """
    if not shuffles(loader):
        return None
    batches: Any = loader.batch_sampler
    sampler = batches.sampler
    everything = torch.full((len(loader.dataset),), float(weights.mean()), dtype=torch.float64)  # type: ignore[arg-type]
    everything[positions] = weights.double()
    if never is not None:
        everything[never] = 0.0
    replacement = ReweightedSampler(everything, len(sampler), trainer.global_rank, trainer.world_size, seed)
    replacement.set_epoch(trainer.current_epoch)
    batches.sampler = replacement

    def undo() -> None:
        batches.sampler = sampler

    return undo
