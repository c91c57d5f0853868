"""The loaders of a run: which there are, what their samplers draw from, and how to read their data sets in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from demem.run.sampling import ReweightedSampler, shuffles

# What a sampler that is known does; of another one (or of a subclass) neither is taken for granted.
_DRAW_EVENLY: tuple[type[Sampler[Any]], ...] = (
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    DistributedSampler,
)
_DRAW_FROM_ALL: tuple[type[Sampler[Any]], ...] = (
    SequentialSampler,
    RandomSampler,
    DistributedSampler,
    WeightedRandomSampler,
    ReweightedSampler,
)


def first_loader(loaders: Any) -> Any:
    """The first of what a trainer holds: a loader, or a dict or list of loaders (or of dicts and lists of them).

    >>> first_loader({"labelled": ["a loader", "another"], "unlabelled": "a third"})
    'a loader'
    """
    if isinstance(loaders, dict) and loaders:
        return first_loader(next(iter(loaders.values())))
    return first_loader(loaders[0]) if isinstance(loaders, list | tuple) and loaders else loaders


def as_joint_batch(loaders: Any, batch: Any) -> Any:
    """A batch of the first loader in the form in which several loaders are read together.

    >>> as_joint_batch({"labelled": "a loader", "unlabelled": "another"}, "a batch")
    {'labelled': 'a batch'}
    """
    if isinstance(loaders, dict) and loaders:
        name, first = next(iter(loaders.items()))
        return {name: as_joint_batch(first, batch)}
    return [as_joint_batch(loaders[0], batch)] if isinstance(loaders, list | tuple) and loaders else batch


def as_step_batch(trainer: pl.Trainer, batch: Any) -> Any:
    """A batch of the first validation loader as a validation step gets it: validation loaders are read one after the
    other, unless a ``CombinedLoader`` reads them together."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    together = getattr(combined, "_mode", "sequential") != "sequential"
    return as_joint_batch(trainer.val_dataloaders, batch) if together else batch


def held_out_loader(trainer: pl.Trainer) -> DataLoader[Any]:
    """The first validation loader of a fit: data that the network does not train on.

    Raises:
        ValueError: there is no validation data, or ``limit_val_batches=0`` switches it off.
    """
    if trainer.val_dataloaders is None and trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined():
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loader = first_loader(trainer.val_dataloaders)
    # With several processes one may have examples where another has none; the pass over them says so on all.
    empty = isinstance(loader, DataLoader) and trainer.world_size == 1 and _is_empty(loader)
    if not isinstance(loader, DataLoader) or trainer.limit_val_batches == 0 or empty:
        raise ValueError(
            "demem needs held-out examples: give the Trainer a validation DataLoader (and do not set "
            "limit_val_batches=0 or a fast run without validation)."
        )
    return loader


def size_of(loader: Any) -> float:
    """Examples of the loader's data set; infinity where it has none or that does not say (a sampler may know instead).

    >>> size_of(DataLoader([1, 2, 3])), size_of("no loader")
    (3, inf)
    """
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return float("inf")


def _is_empty(loader: DataLoader[Any]) -> bool:
    return has_positions(loader) and size_of(loader) == 0


def kept_back_positions(trainer: pl.Trainer, share: float | None, seed: int, default: float = 0.2) -> Tensor | None:
    """Positions in the training data set of the examples to keep back, ascending; ``None`` to use the validation data.

    Args:
        trainer: of the run.
        share: of the training examples; ``None`` takes the validation data, and ``default`` where there are none.
        seed: of the draw.
        default: see above.

    Raises:
        ValueError: examples must be kept back, but the training loader is no ``DataLoader`` that shuffles by itself.
    """
    missing: ValueError | None = None
    if share is None:
        try:
            held_out_loader(trainer)
            return None
        except ValueError as error:
            missing = error
    loader = first_loader(trainer.train_dataloader)
    if not isinstance(loader, DataLoader) or not has_positions(loader) or not shuffles(loader):
        raise missing or ValueError(
            "demem cannot keep training examples back: the training DataLoader does not shuffle, or has a sampler of "
            "its own. Use shuffle=True, or give the Trainer a validation DataLoader and leave held_out out."
        )
    positions = positions_drawn_from(trainer, loader)
    size = round((default if share is None else share) * len(positions))
    chosen = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))[:size]
    return positions[chosen].sort().values


def train_loader(trainer: pl.Trainer) -> DataLoader[Any]:
    """The (first) training loader of a fit.

    Raises:
        ValueError: it is not a ``DataLoader``.
    """
    loader = first_loader(trainer.train_dataloader)
    if not isinstance(loader, DataLoader):
        raise ValueError(f"demem needs a training DataLoader to read in order, got {type(loader).__name__}.")
    return loader


def has_positions(loader: DataLoader[Any]) -> bool:
    """Whether examples of the loader's data set can be read by their positions (it is not iterable)."""
    return not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None


def sampler_of(loader: DataLoader[Any]) -> Any:
    """What the loader's batches are drawn by, without Lightning's wrapper for several processes."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    return sampler if wrapped is None else wrapped


def draws_evenly(loader: Any) -> bool:
    """Whether the loader is known to draw all examples that it draws from equally often."""
    if not isinstance(loader, DataLoader) or not has_positions(loader):
        return True
    sampler = sampler_of(loader)
    return type(sampler) in _DRAW_EVENLY and not bool(getattr(sampler, "replacement", False))


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


def is_training_loader(trainer: pl.Trainer, loader: DataLoader[Any]) -> bool:
    """Whether the loader is the run's (first) training loader."""
    return loader is first_loader(trainer.train_dataloader)


def batch_limit(trainer: pl.Trainer, loader: DataLoader[Any]) -> int | None:
    """How many batches of the loader ``limit_train_batches`` or ``limit_val_batches`` allow; ``None``: all."""
    limit = trainer.limit_train_batches if is_training_loader(trainer, loader) else trainer.limit_val_batches
    if isinstance(limit, float):
        return None if limit >= 1.0 else int(len(loader) * limit)
    return limit


def positions_drawn_from(trainer: pl.Trainer, loader: DataLoader[Any], limit: int | None = None) -> Tensor:
    """Positions in the data set, ascending int64, of the examples that are the loader's.

    Its sampler may draw from a part of the data set.  ``limit_train_batches`` and ``limit_val_batches`` hold; of
    shuffled data they take evenly spaced examples.

    Args:
        trainer: of the run.
        loader: with positions (:func:`has_positions`).
        limit: at most this many, evenly spaced.
    """
    positions = _drawn_from(trainer, loader)
    batches = batch_limit(trainer, loader)
    if batches is not None:
        some = batches * (loader.batch_size or 64) * trainer.world_size
        positions = positions[:some] if _is_sequential(loader) else evenly_spaced(positions, some)
    return positions if limit is None else evenly_spaced(positions, limit)


def _drawn_from(trainer: pl.Trainer, loader: DataLoader[Any]) -> Tensor:
    sampler = sampler_of(loader)
    chosen = getattr(sampler, "indices", None)
    if chosen is None and not isinstance(sampler, _DRAW_FROM_ALL) and not is_training_loader(trainer, loader):
        with _own_generators(loader):
            drawn = list(sampler) if sampler is not None else [i for batch in loader.batch_sampler for i in batch]  # type: ignore[union-attr]
        chosen = trainer.strategy.broadcast(sorted(set(drawn)))
    if chosen is None:
        return torch.arange(len(loader.dataset))  # type: ignore[arg-type]
    return torch.as_tensor(chosen).sort().values


def _is_sequential(loader: DataLoader[Any]) -> bool:
    sampler = sampler_of(loader)
    return isinstance(sampler, SequentialSampler) or getattr(sampler, "shuffle", True) is False


def evenly_spaced(values: Tensor, size: int) -> Tensor:
    """At most ``size`` of the values, from the first to the last, evenly spaced and all distinct."""
    if len(values) <= size:
        return values
    # i (n − 1) / (size − 1), rounded, in integers: a float of the ambient dtype has too few digits for large n.
    steps = max(1, size - 1)
    return values[(2 * torch.arange(size) * (len(values) - 1) + steps) // (2 * steps)]


def batches_of(positions: Tensor, size: int) -> list[Tensor]:
    """Split positions into batches, none of which has a single example.

    A lone last example joins the batch before it, as ``drop_last=True`` may guard networks that cannot take a batch of
    one (batch norm in training, ``squeeze()``).

    >>> batches_of(torch.arange(7), 3)
    [tensor([0, 1, 2]), tensor([3, 4, 5, 6])]
    """
    parts = list(torch.split(positions, size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def reading(loader: DataLoader[Any], batches: Sequence[Tensor]) -> DataLoader[Any]:
    """A loader of the same kind that gives these batches of positions, in this order."""
    return DataLoader(
        loader.dataset,
        batch_sampler=_Lists(batches),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def draws_known_positions(loader: DataLoader[Any]) -> bool:
    """Whether the loader's sampler is one of those that are known to draw integers."""
    return isinstance(sampler_of(loader), (*_DRAW_EVENLY, *_DRAW_FROM_ALL))


class _Lists(Sampler[list[int]]):
    """Batches of positions as lists of integers, one list at a time: a list of them all would take 36 bytes a row."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches)


def streaming(loader: DataLoader[Any], limit: int | None) -> Iterator[Any]:
    """The first ``limit`` batches of an iterable data set."""
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
            multiprocessing_context=loader.multiprocessing_context,
        )
    with _own_generators(loader):
        for i, batch in enumerate(loader):
            if limit is not None and i >= limit:
                return
            yield batch


@contextmanager
def _own_generators(loader: DataLoader[Any]) -> Iterator[None]:
    """Let the generators of a loader and of its samplers draw the same in every pass, and put them back afterwards, as
    what they draw is the run's."""
    batches = loader.batch_sampler
    owners = [loader, loader.sampler, batches, sampler_of(loader), getattr(loader.sampler, "sampler", None)]
    values = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]
    before = [(value, value.get_state()) for value in values if isinstance(value, torch.Generator)]
    for generator, _ in before:
        generator.manual_seed(0)
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)
