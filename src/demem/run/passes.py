"""Extra passes over data from inside a Trainer that leave the training run as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from demem.batch import Batch, batch_size, unpack_batch
from demem.run.loaders import batch_limit, find_grouper, has_positions, positions_drawn_from, reading, streaming
from demem.tracing import select_rows

_extra_passes = 0


def in_extra_pass() -> bool:
    """Whether a callback of demem is reading or fine-tuning just now; monitoring hooks ignore these passes."""
    return _extra_passes > 0


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch (all devices) afterwards, also after an exception."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the state that data sets use)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def undisturbed(trainer: pl.Trainer, pl_module: pl.LightningModule, grad: bool = False) -> Iterator[None]:
    """Run in evaluation mode and the trainer's precision, without gradients unless asked for.

    With gradients, a run in ``16-mixed`` precision computes in full precision, since the gradients would need the
    trainer's loss scaling; those in bfloat16 do not.

    Afterwards every module's mode, the random state and (as nothing ran in training mode) the batch-norm statistics are
    as they were.
    """
    global _extra_passes
    modes = [(module, module.training) for module in pl_module.modules()]
    _extra_passes += 1
    try:
        with isolated_rng(), torch.set_grad_enabled(grad), trainer.precision_plugin.forward_context():
            pl_module.eval()
            with _without_fp16(trainer) if grad else nullcontext():
                yield
    finally:
        _extra_passes -= 1
        for module, mode in modes:
            module.training = mode


def _without_fp16(trainer: pl.Trainer) -> torch.autocast:
    kind = trainer.strategy.root_device.type
    return torch.autocast(kind, enabled=trainer.precision == "bf16-mixed", dtype=torch.bfloat16)


def examples(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loader: DataLoader[Any],
    description: str | None = None,
    limit: int | None = None,
    only: Tensor | None = None,
) -> Iterator[tuple[Tensor, Batch]]:
    """Go once through the loader's data set, in its own order, without shuffling, padding or repeats.

    Every process of a distributed run gets its own share; :func:`demem.run.gather_rows` puts what they made in order
    again.  An iterable data set is read as its loader yields it, from the same random state each time, so that one that
    shuffles gives the same order.  Call this within :func:`undisturbed`.

    Args:
        trainer, pl_module: of the run.
        loader: of the training or the validation data.
        description: of the progress bar; none is shown without it.
        limit: at most this many examples, evenly spaced over the data set; the first ones of an iterable data set.
        only: positions in the data set, ascending; an iterable data set is read up to the last one.

    Yields:
        positions ``(B,)`` int64 in the data set, and the :class:`~demem.batch.Batch` on the module's device.

    Raises:
        ValueError: a batch has not one row for each example that it was asked for.
    """
    rank, world = trainer.global_rank, trainer.world_size
    positions, source = _source(trainer, loader, limit, only)
    if positions is None:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002 (what a stream shuffles by)
    grouper = find_grouper(trainer, loader)
    shown = bool(description) and trainer.progress_bar_callback is not None and trainer.is_global_zero
    seen = 0
    for raw in tqdm(source, desc=description, leave=False, disable=not shown):
        batch = unpack_batch(to_device(trainer, raw), pl_module, grouper)
        size = batch_size(batch)
        if positions is None:
            here = torch.arange(seen, seen + size) * world + rank
            if only is None:
                yield here, batch
            elif bool((wanted := torch.isin(here, only)).any()):
                yield here[wanted], select_rows(batch, wanted)
        else:
            asked = positions[seen : seen + source.batch_size]
            if len(asked) != size:
                raise ValueError(
                    f"A batch of {len(asked)} examples has {size} rows: its collate function or unpack_batch leaves "
                    "out, doubles or merges rows, so they cannot be told apart by their positions in the data set. "
                    "Take damaged examples out of the data set beforehand, and yield one row per example."
                )
            yield asked, batch
        seen += size
        # A stream may be endless.
        if positions is None and limit is not None and seen * world >= limit:
            return
        if positions is None and only is not None and seen * world > int(only[-1]):
            return


def batches_at(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loader: DataLoader[Any], positions: Tensor, size: int
) -> Iterator[Batch]:
    """The examples at these positions of the data set, in this order and in batches of ``size``, the same on every
    process; call this within :func:`undisturbed`."""
    for raw in reading(loader, positions, size):
        yield unpack_batch(to_device(trainer, raw), pl_module)


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """The batch as a validation step would get it: converted to the precision, and on the module's device."""
    stage = trainer.state.stage
    trainer.validating = True  # a module may augment batches of training on their way
    try:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.state.stage = stage


def _source(
    trainer: pl.Trainer, loader: DataLoader[Any], limit: int | None, only: Tensor | None
) -> tuple[Tensor | None, Any]:
    """This process's positions, and the loader or stream that gives their examples."""
    if not has_positions(loader):
        return None, streaming(loader, batch_limit(trainer, loader))
    positions = positions_drawn_from(trainer, loader, limit) if only is None else only
    positions = positions[trainer.global_rank :: trainer.world_size]
    return positions, reading(loader, positions, loader.batch_size or 64)
