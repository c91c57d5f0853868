"""Extra passes over data from inside a Trainer that leave the training run as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler
from tqdm.auto import tqdm

from demem.batch import Batch, batch_size, unpack_batch
from demem.callbacks._sampling import ReweightedSampler

_WHOLE = (SequentialSampler, RandomSampler, DistributedSampler, WeightedRandomSampler, ReweightedSampler)
"""Samplers that draw from all of a data set."""


def held_out_loader(trainer: pl.Trainer) -> DataLoader[Any]:
    """The first validation loader of a fit: data that the network does not train on.

    Raises:
        ValueError: there is no validation data, or ``limit_val_batches=0`` switches it off.
    """
    if trainer.val_dataloaders is None and trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined():
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loader = first_loader(trainer.val_dataloaders)
    if not isinstance(loader, DataLoader) or trainer.limit_val_batches == 0:
        raise ValueError(
            "demem needs held-out examples: give the Trainer a validation DataLoader (and do not set "
            "limit_val_batches=0 or a fast run without validation)."
        )
    return loader


def train_loader(trainer: pl.Trainer) -> DataLoader[Any]:
    """The (first) training loader of a fit.

    Raises:
        ValueError: it is not a ``DataLoader``.
    """
    loader = first_loader(trainer.train_dataloader)
    if not isinstance(loader, DataLoader):
        raise ValueError(f"demem needs a training DataLoader to read in order, got {type(loader).__name__}.")
    return loader


def first_loader(loaders: Any) -> Any:
    """The first of what a trainer holds: a loader, or a dict or list of loaders."""
    if isinstance(loaders, dict) and loaders:
        loaders = next(iter(loaders.values()))
    return loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders


_extra_passes = 0


def in_extra_pass() -> bool:
    """Whether a callback of demem is reading or fine-tuning just now, so that hooks which watch the run look away."""
    return _extra_passes > 0


@contextmanager
def undisturbed(trainer: pl.Trainer, pl_module: pl.LightningModule, grad: bool = False) -> Iterator[None]:
    """Evaluation mode, the trainer's precision, no gradients (unless asked for); afterwards every module's mode, the
    random state and (as nothing ran in training mode) the batch-norm statistics are as they were."""
    global _extra_passes
    modes = [(module, module.training) for module in pl_module.modules()]
    _extra_passes += 1
    try:
        with isolate_rng(), torch.set_grad_enabled(grad), trainer.precision_plugin.forward_context():
            pl_module.eval()
            yield
    finally:
        _extra_passes -= 1
        for module, mode in modes:
            module.training = mode


def examples(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loader: DataLoader[Any],
    description: str | None = None,
    limit: int | None = None,
    only: Tensor | None = None,
) -> Iterator[tuple[Tensor, Batch]]:
    """Go once through the loader's data set, in its own order, without shuffling, padding or repeats.

    Every process of a distributed run gets its own share; :func:`gather_rows` puts what they made in order again.
    ``limit_train_batches`` and ``limit_val_batches`` hold; of shuffled data they take evenly spaced examples.  An
    iterable data set is read as its loader yields it, from the same random state each time, so that one that shuffles
    gives the same order; call this within :func:`undisturbed`.

    Args:
        trainer, pl_module: of the run.
        loader: of the training or the validation data.
        description: of the progress bar; none is shown without it.
        limit: at most so many examples, evenly spaced over the data set; the first ones of an iterable data set.
        only: positions in the data set, ascending; an iterable data set is read whole.

    Yields:
        positions ``(B,)`` int64 in the data set, and the :class:`~demem.batch.Batch` on the module's device.
    """
    rank, world = trainer.global_rank, trainer.world_size
    positions, source = _in_order(trainer, loader, rank, world, limit, only)
    if positions is None:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002 (what a stream shuffles by)
    grouper = find_grouper(trainer, loader)
    shown = bool(description) and trainer.progress_bar_callback is not None and trainer.is_global_zero
    seen = 0
    for raw in tqdm(source, desc=description, leave=False, disable=not shown):
        batch = unpack_batch(_to_device(trainer, raw), pl_module, grouper)
        size = batch_size(batch)
        here = torch.arange(seen, seen + size)
        yield (here * world + rank if positions is None else positions[here]), batch
        seen += size
        if positions is None and limit is not None and seen * world >= limit:
            return  # it may be endless


def has_positions(loader: DataLoader[Any]) -> bool:
    """Whether examples of the loader's data set can be read by their positions (it is not iterable)."""
    return not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None


def batches_of(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loader: DataLoader[Any], positions: Tensor, size: int
) -> Iterator[Batch]:
    """The examples at these positions of the data set (:func:`has_positions`), in this order, the same on every
    process."""
    for raw in _reading(loader, positions, size):
        yield unpack_batch(_to_device(trainer, raw), pl_module)


def network(pl_module: pl.LightningModule, head: nn.Module) -> nn.Module:
    """What to call for logits: the module itself, or, where it has no ``forward`` of its own, the part that holds the
    head.

    Raises:
        ValueError: no part of the module holds the head.
    """
    # The two Lightning packages have class trees of their own, so the module is asked by name.
    libraries = ("pytorch_lightning", "lightning", "torch")
    if any("forward" in vars(c) for c in type(pl_module).__mro__ if c.__module__.split(".")[0] not in libraries):
        return pl_module
    for child in pl_module.children():
        if any(module is head for module in child.modules()) and child is not head:
            return child
    raise ValueError(f"{type(pl_module).__name__} has no forward(self, x) that returns logits; define one.")


def gather_rows(trainer: pl.Trainer, indices: Tensor, rows: Tensor) -> Tensor:
    """Rows of all processes in the order of their positions, on every process.

    Args:
        indices: ``(n,)`` positions of this process's rows, from :func:`examples`.
        rows: ``(n, ...)``; ``n`` may differ between processes.
    """
    if trainer.world_size > 1:
        indices, rows = _all_gather(trainer, indices), _all_gather(trainer, rows)
    return rows[torch.argsort(indices.to(rows.device), stable=True)]


def find_grouper(trainer: pl.Trainer, loader: DataLoader[Any]) -> Callable[[Tensor], Tensor] | None:
    """``metadata_to_group`` of the data module's ``grouper`` or of a wilds data set behind the loader, if any."""
    candidates = [getattr(trainer, "datamodule", None)]
    dataset = getattr(loader, "dataset", None)
    while dataset is not None and len(candidates) < 10:
        candidates.append(dataset)
        dataset = getattr(dataset, "dataset", None)
    for owner in candidates:
        grouper = getattr(owner, "grouper", None) or getattr(owner, "_eval_grouper", None)
        function = getattr(grouper, "metadata_to_group", None)
        if callable(function):
            return _on_cpu(function)
    return None


def _on_cpu(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    # wilds groupers keep their factors on the CPU.
    return lambda metadata: function(metadata.cpu()).to(metadata.device)


def _in_order(
    trainer: pl.Trainer, loader: DataLoader[Any], rank: int, world: int, limit: int | None, only: Tensor | None
) -> tuple[Tensor | None, Any]:
    batches = _batch_limit(trainer, loader)
    if not has_positions(loader):
        return None, _first(loader, batches)
    per_batch = loader.batch_size or 64
    if only is not None:
        return only[rank::world], _reading(loader, only[rank::world], per_batch)
    positions = _own_positions(trainer, loader)
    if batches is not None:
        some = batches * per_batch * world
        positions = positions[:some] if _sequential(loader) else _evenly(positions, some)
    if limit is not None:
        positions = _evenly(positions, limit)
    positions = positions[rank::world]
    return positions, _reading(loader, positions, per_batch)


def _evenly(positions: Tensor, size: int) -> Tensor:
    if len(positions) <= size:
        return positions
    return positions[torch.linspace(0, len(positions) - 1, size).round().long()]


def sampler_of(loader: DataLoader[Any]) -> Any:
    """What the loader's batches are drawn by, without Lightning's wrapper for several processes."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    return sampler if wrapped is None else wrapped


def _sequential(loader: DataLoader[Any]) -> bool:
    sampler = sampler_of(loader)
    return isinstance(sampler, SequentialSampler) or getattr(sampler, "shuffle", True) is False


def _own_positions(trainer: pl.Trainer, loader: DataLoader[Any]) -> Tensor:
    """Positions in the data set, ascending, of the examples that are the loader's: its sampler may draw from a part."""
    sampler = sampler_of(loader)
    chosen = getattr(sampler, "indices", None)
    if chosen is None and not isinstance(sampler, _WHOLE) and loader is not first_loader(trainer.train_dataloader):
        with isolate_rng():
            drawn = list(sampler) if sampler is not None else [i for batch in loader.batch_sampler for i in batch]  # type: ignore[union-attr]
        chosen = trainer.strategy.broadcast(sorted(set(drawn)))
    if chosen is None:
        return torch.arange(len(loader.dataset))  # type: ignore[arg-type]
    return torch.as_tensor(chosen).sort().values


def _reading(loader: DataLoader[Any], positions: Tensor, size: int) -> DataLoader[Any]:
    """The loader's examples at these positions, in this order."""
    return DataLoader(
        Subset(loader.dataset, positions.tolist()),
        batch_size=size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
    )


def _first(loader: DataLoader[Any], limit: int | None) -> Iterator[Any]:
    if loader.persistent_workers:  # its iterator is the trainer's own, and would start again
        loader = DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            sampler=None if isinstance(loader.dataset, IterableDataset) else loader.sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            drop_last=loader.drop_last,
            worker_init_fn=loader.worker_init_fn,
        )
    for i, batch in enumerate(loader):
        if limit is not None and i >= limit:
            return
        yield batch


def _batch_limit(trainer: pl.Trainer, loader: DataLoader[Any]) -> int | None:
    training = loader is first_loader(trainer.train_dataloader)
    limit = trainer.limit_train_batches if training else trainer.limit_val_batches
    if isinstance(limit, float):
        return None if limit >= 1.0 else int(len(loader) * limit)
    return limit


def _to_device(trainer: pl.Trainer, batch: Any) -> Any:
    stage = trainer.state.stage
    trainer.validating = True  # a module may augment batches of training on their way
    try:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.state.stage = stage


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
