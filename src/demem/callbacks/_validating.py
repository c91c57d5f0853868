"""Which processes of a distributed fit validate."""

from __future__ import annotations

from contextlib import suppress

import pytorch_lightning as pl
import torch

from demem.callbacks._passes import gather_rows, held_out_loader


def validating_ranks(trainer: pl.Trainer) -> list[int]:
    """Ranks whose validation loaders have batches; call it on every process, from ``on_train_start`` on.

    On the others (``allow_zero_length_dataloader_with_multiple_devices``) Lightning runs no hook of a validation at
    all, so that a hook which waits for every process there would wait for ever.
    """
    if trainer.world_size == 1:
        return [0]
    with suppress(ValueError):  # nobody validates
        held_out_loader(trainer)
    rank = torch.tensor([trainer.global_rank])
    has_batches = torch.tensor([sum(trainer.num_val_batches) > 0], dtype=torch.long)
    return [int(r) for r in gather_rows(trainer, rank, has_batches).nonzero()]
