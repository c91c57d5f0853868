"""Put together what the processes of a distributed run have read."""

from __future__ import annotations

from contextlib import suppress

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from demem.run.loaders import held_out_loader
from demem.tracing import Ranks


def gather_rows(trainer: pl.Trainer, positions: Tensor, rows: Tensor) -> Tensor:
    """Put the rows of all processes in the order of their positions, on every process.

    Args:
        trainer: of the run.
        positions: ``(n,)`` of this process's rows.
        rows: ``(n, ...)``; ``n`` may differ between processes.
    """
    if trainer.world_size > 1:
        positions, rows = _all_gather(trainer, positions), _all_gather(trainer, rows)
    return rows[torch.argsort(positions.to(rows.device), stable=True)]


def validating_ranks(trainer: pl.Trainer) -> list[int]:
    """Find the processes whose validation loaders have batches; every process calls it, in ``on_train_start`` or later.

    On the others (``allow_zero_length_dataloader_with_multiple_devices``) Lightning runs no hook of a validation at
    all, so a hook which waits for every process there would wait for ever.
    """
    if trainer.world_size == 1:
        return [0]
    with suppress(ValueError):  # nobody validates
        held_out_loader(trainer)
    rank = torch.tensor([trainer.global_rank])
    has_batches = torch.tensor([sum(trainer.num_val_batches) > 0], dtype=torch.long)
    return [int(r) for r in gather_rows(trainer, rank, has_batches).nonzero()]


def ranks_of(trainer: pl.Trainer) -> Ranks:
    """The processes of a run, as the functions of :mod:`demem.tracing` and :mod:`demem.removal` take them."""
    if trainer.world_size == 1:
        return Ranks()

    def gather(rows: Tensor) -> Tensor:
        order = torch.arange(len(rows)) * trainer.world_size + trainer.global_rank
        gathered = gather_rows(trainer, order, rows.to(torch.uint8) if rows.dtype == torch.bool else rows)
        return gathered.to(rows.dtype)

    def total(value: Tensor) -> Tensor:
        return torch.as_tensor(trainer.strategy.reduce(value.clone(), reduce_op="sum"))

    return Ranks(gather, total, trainer.global_rank)


def copy_first(trainer: pl.Trainer, tensors: list[Tensor]) -> None:
    """Write the first process's values into the tensors of all, in place."""
    if trainer.world_size > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def _all_gather(trainer: pl.Trainer, rows: Tensor) -> Tensor:
    rows = rows.to(trainer.strategy.root_device).contiguous()
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(trainer.world_size)]
    dist.all_gather(sizes, size)
    longest = int(max(int(s) for s in sizes))
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(s)] for part, s in zip(parts, sizes, strict=True)])
