"""Change how often a DataLoader draws each training example, without replacing the loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler
from torch.utils.data.distributed import DistributedSampler


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
        drawn = torch.multinomial(self.weights, self.num_samples * self.world, replacement=True, generator=generator)
        return iter(drawn[self.rank :: self.world].tolist())


def reweight(
    loader: DataLoader[Any], positions: Tensor, weights: Tensor, trainer: pl.Trainer, seed: int
) -> Callable[[], None] | None:
    """Put a :class:`ReweightedSampler` in the loader's batch sampler, from the next epoch's iterator on.

    Args:
        loader: of the training data.
        positions: ``(S,)`` in the data set; all others get the mean weight.
        weights: ``(S,)`` of those positions.
        trainer: of the run.
        seed: see :class:`ReweightedSampler`.

    Returns:
        A function that puts the loader's own sampler back; or ``None``, with nothing changed, if the loader does not
        shuffle by a sampler that is known (a sampler of the user's own is not overruled).
    """
    batches: Any = loader.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if type(sampler) not in (RandomSampler, DistributedSampler) or not getattr(sampler, "shuffle", True):
        return None
    everything = torch.full((len(loader.dataset),), float(weights.mean()), dtype=torch.float64)  # type: ignore[arg-type]
    everything[positions] = weights.double()
    replacement = ReweightedSampler(everything, len(sampler), trainer.global_rank, trainer.world_size, seed)  # type: ignore[arg-type]
    replacement.set_epoch(trainer.current_epoch)
    batches.sampler = replacement

    def undo() -> None:
        batches.sampler = sampler

    return undo
