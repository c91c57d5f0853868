"""Extra passes over data from inside a Trainer that leave the training run as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import RunningStage
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from demem.batch import Batch, batch_size, form_of, unpack_batch
from demem.run.loaders import (
    as_joint_batch,
    as_step_batch,
    batch_limit,
    batches_of,
    draws_known_positions,
    find_grouper,
    first_loader,
    has_positions,
    is_training_loader,
    positions_drawn_from,
    reading,
    sampler_of,
    streaming,
)
from demem.sites import restore_modes
from demem.tracing import select_rows

_extra_passes = 0
_inputs: WeakKeyDictionary[pl.Trainer, Callable[[Any], Any]] = WeakKeyDictionary()


def read_inputs_by(trainer: pl.Trainer, function: Callable[[Any], Any] | None) -> None:
    """Let the passes of this trainer take inputs from a function of the batch, see :func:`demem.run.check_inputs`;
    ``None`` takes those that the batch holds."""
    _inputs.pop(trainer, None)
    if function is not None:
        _inputs[trainer] = function


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
        restore_modes(modes)


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
    for position, _, batch in device_batches(trainer, pl_module, loader, description, limit, only):
        yield position, batch


def device_batches(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loader: DataLoader[Any],
    description: str | None = None,
    limit: int | None = None,
    only: Tensor | None = None,
) -> Iterator[tuple[Tensor, Any, Batch]]:
    """As :func:`examples`, with what a validation step would get as its batch in the middle."""
    rank, world = trainer.global_rank, trainer.world_size
    batches, source = _source(trainer, loader, limit, only)
    if batches is None:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002 (what a stream shuffles by)
    elif not draws_known_positions(loader):
        source = _by_integers(loader, source)
    shown = bool(description) and trainer.progress_bar_callback is not None and trainer.is_global_zero
    seen = 0
    for i, raw in enumerate(tqdm(source, desc=description, leave=False, disable=not shown)):
        moved = to_device(trainer, raw)
        batch = _prepared(trainer, moved, _unpacked(trainer, pl_module, loader, moved))
        size = batch_size(batch)
        if batches is None:
            here = torch.arange(seen, seen + size) * world + rank
            if only is None:
                yield here, moved, batch
            elif bool((wanted := torch.isin(here, only)).any()):
                yield here[wanted], moved, select_rows(batch, wanted)
        else:
            if len(batches[i]) != size:
                raise ValueError(
                    f"A batch of {len(batches[i])} examples has {size} rows: its collate function or unpack_batch "
                    "leaves out, doubles or merges rows, so they cannot be told apart by their positions in the data "
                    "set. Take damaged examples out of the data set beforehand, and yield one row per example."
                )
            yield batches[i], moved, batch
        seen += size
        # A stream may be endless.
        if batches is None and limit is not None and seen * world >= limit:
            return
        if batches is None and only is not None and seen * world > int(only[-1]):
            return


def _by_integers(loader: DataLoader[Any], source: Any) -> Iterator[Any]:
    """The batches, with another word for the error of a data set that is read by other keys than integers."""
    try:
        yield from source
    except (TypeError, LookupError) as error:
        sampler = type(sampler_of(loader) or loader.batch_sampler).__name__
        raise ValueError(
            f"The examples of {type(loader.dataset).__name__} cannot be read by their positions 0 … n − 1 "
            f"({type(error).__name__}: {error}); its sampler {sampler} may draw other keys, such as names or "
            "(index, size). Let the data set take an integer, too."
        ) from error


def first_held_out_batch(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """What a validation step would get as its first batch; ``None`` of a stream, which is not opened a second time, and
    of a loader that is no ``DataLoader``."""
    loader = first_loader(trainer.val_dataloaders)
    if not isinstance(loader, DataLoader) or not has_positions(loader):
        return None
    first = batches_of(positions_drawn_from(trainer, loader), loader.batch_size or 64)[:1]
    with undisturbed(trainer, pl_module):
        batch = next((to_device(trainer, raw) for raw in reading(loader, first)), None)
    return None if batch is None else as_step_batch(trainer, batch)


def batches_at(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loader: DataLoader[Any], positions: Tensor, size: int
) -> Iterator[Batch]:
    """The examples at these positions of the data set, in this order and in batches of ``size`` (of one more, where a
    single example would be left), the same on every process; call this within :func:`undisturbed`."""
    for raw in reading(loader, batches_of(positions, size)):
        moved = to_device(trainer, raw)
        yield _prepared(trainer, moved, _unpacked(trainer, pl_module, loader, moved))


def _unpacked(trainer: pl.Trainer, pl_module: pl.LightningModule, loader: DataLoader[Any], batch: Any) -> Batch:
    """Read a batch; a method ``unpack_batch`` finds the trainer in the stage of the batch, and the batch in the form
    that a step gets."""
    grouper, training = find_grouper(trainer, loader), is_training_loader(trainer, loader)
    with in_stage(trainer, RunningStage.TRAINING if training else RunningStage.VALIDATING):
        whole = as_joint_batch(trainer.train_dataloader, batch) if training else as_step_batch(trainer, batch)
        if whole is batch or not callable(getattr(pl_module, "unpack_batch", None)):
            return unpack_batch(batch, pl_module, grouper)
        try:
            return unpack_batch(whole, pl_module, grouper)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise TypeError(
                "Of several loaders that are read together demem reads the first alone, as a batch that is "
                f"{form_of(whole)}. unpack_batch(self, batch) cannot read that "
                f"({type(error).__name__}: {error}); let it do without the others, and put the loader of the "
                "labelled examples first."
            ) from error


def _prepared(trainer: pl.Trainer, batch: Any, unpacked: Batch) -> Batch:
    inputs = _inputs.get(trainer)
    return unpacked if inputs is None else unpacked._replace(x=inputs(batch))


@contextmanager
def in_stage(trainer: pl.Trainer, stage: RunningStage) -> Iterator[None]:
    """Let the trainer say that it is in this stage."""
    before = trainer.state.stage
    trainer.state.stage = stage
    try:
        yield
    finally:
        trainer.state.stage = before


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """The batch as a validation step would get it: converted to the precision, and on the module's device."""
    with in_stage(trainer, RunningStage.VALIDATING):  # a module may augment batches of training on their way
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _source(
    trainer: pl.Trainer, loader: DataLoader[Any], limit: int | None, only: Tensor | None
) -> tuple[list[Tensor] | None, Any]:
    """This process's positions in batches, and the loader or stream that gives their examples."""
    if not has_positions(loader):
        return None, streaming(loader, batch_limit(trainer, loader))
    positions = positions_drawn_from(trainer, loader, limit) if only is None else only
    batches = batches_of(positions[trainer.global_rank :: trainer.world_size], loader.batch_size or 64)
    batches = [batch for batch in batches if len(batch)]
    return batches, reading(loader, batches)
