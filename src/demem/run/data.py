"""The training and the held-out examples of a run: read them, row by row, at the sites of its network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from demem.batch import Batch, apply_model
from demem.groups import sketch
from demem.run.head import model_with_head
from demem.run.loaders import (
    evenly_spaced,
    has_positions,
    held_out_loader,
    is_training_loader,
    positions_drawn_from,
    train_loader,
)
from demem.run.passes import batches_at, examples, undisturbed
from demem.run.processes import gather_rows
from demem.sites import ActivationReader, Reduce, Site, check_finite, find_head


@dataclass(frozen=True)
class Rows:
    """One row per example of all processes, in the order of the data set, the same on every process.

    Attributes:
        position: ``(S,)`` int64 in the data set (in the stream, for an iterable one).
        y: ``(S,)`` int64 class indices.
        group: ``(S,)`` int64, or ``None`` where a batch has none.
        activations: ``{site name: (S, N)}`` float32, pooled over space or tokens.
        logits: ``(S, C)`` float32, or ``None`` if they were not asked for.
        sketches: ``{site name: (S, M)}`` float32, whole activations as random sums (:func:`demem.groups.sketch`), where
            they were asked for and all examples have activations of one shape.
    """

    position: Tensor
    y: Tensor
    group: Tensor | None
    activations: dict[str, Tensor]
    logits: Tensor | None = None
    sketches: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        sites = ", ".join(f"{name}: {tuple(rows.shape)}" for name, rows in self.activations.items())
        groups = "without groups" if self.group is None else "with groups"
        return f"Rows({len(self)} examples {groups}; {sites or 'no activations'})"


class Split:
    """The training or the held-out examples of a run.

    Args:
        trainer, pl_module: of the run.
        loader: of the examples.
        model: gives the logits.
        max_examples: at most this many training examples are read, evenly spaced.
        positions: ascending, of the examples of the data set that are the split's; default those that the loader draws.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loader: DataLoader[Any],
        model: nn.Module,
        max_examples: int | None = None,
        positions: Tensor | None = None,
    ) -> None:
        self.trainer, self.pl_module, self.loader, self.model = trainer, pl_module, loader, model
        self.max_examples = max_examples if is_training_loader(trainer, loader) else None
        self.positions = positions

    @property
    def has_positions(self) -> bool:
        """Whether single examples can be read by their positions (the data set is not iterable)."""
        return has_positions(self.loader)

    @property
    def batch_size(self) -> int:
        return self.loader.batch_size or 64

    def examples(
        self, description: str | None = None, limit: int | None = None, only: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Batch]]:
        """This process's examples with their positions, see :func:`demem.run.passes.examples`; call this within
        :func:`demem.run.undisturbed`."""
        sizes = [size for size in (self.max_examples, limit) if size is not None]
        most = min(sizes) if sizes else None
        both = len(sizes) == 2 and self.has_positions  # the fewer are some of the more
        if only is None and (self.positions is not None or both):
            only = positions_drawn_from(self.trainer, self.loader) if self.positions is None else self.positions
            for size in sizes:
                only = evenly_spaced(only, size)
        return examples(self.trainer, self.pl_module, self.loader, description, most, only)

    def batches_at(self, positions: Tensor, size: int) -> Iterator[Batch]:
        """See :func:`demem.run.passes.batches_at`."""
        return batches_at(self.trainer, self.pl_module, self.loader, positions, size)

    def read(
        self,
        sites: Sequence[Site] = (),
        description: str | None = None,
        *,
        reduce: Reduce = "mean",
        logits: bool = False,
        sketches: bool = False,
        optional: bool = False,
        limit: int | None = None,
        only: Tensor | None = None,
    ) -> Rows:
        """Read labels, groups and activations in one pass that leaves the run as it was.

        Args:
            sites: whose activations to read.
            description: of the progress bar; none is shown without it.
            reduce: over space or tokens, see :func:`demem.sites.reduce_activation`.
            logits: read these, too.
            sketches: read these, too.
            optional: leave out layers that do not run, or do not give one row per example, unless none does.
            limit: at most this many examples, evenly spaced.
            only: positions in the data set, ascending.

        Raises:
            ValueError: a layer does not give one row per example, an activation is not finite, or as
                :func:`demem.run.passes.examples`.
        """

        shapes: dict[str, set[torch.Size]] = {}

        def sketched(site: Site, activation: Tensor) -> Tensor:
            shapes.setdefault(site.name, set()).add(activation.shape[1:])
            return sketch(activation)

        whole = ActivationReader(sites if sketches else (), sketched, optional=True)

        def columns(batch: Batch, out: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = {f"site {name}": check_finite(v.float(), f"layer {name!r}") for name, v in seen.items()}
            if sketches:
                drawn = whole.pop().items()
                found |= {f"sketch {name}": values for name, values in drawn if len(shapes[name]) == 1}
            found["y"] = batch.y
            if batch.group is not None:
                found["group"] = batch.group
            if logits:
                found["logits"] = out.float()
            return found

        with whole:
            position, rows, uneven = self._pass(columns, sites, description, reduce, optional, limit, only)
        names = [site.name for site in sites]
        wrong = [name for name in names if f"site {name}" in uneven]
        if wrong and (not optional or not any(f"site {name}" in rows for name in names)):
            raise UnevenRows(wrong)
        activations = {name: rows[f"site {name}"] for name in names if f"site {name}" in rows}
        random_sums = {name: rows[f"sketch {name}"] for name in activations if f"sketch {name}" in rows}
        return Rows(position, rows["y"], rows.get("group"), activations, rows.get("logits"), random_sums)

    def map(
        self,
        function: Callable[[Batch, Tensor, Mapping[str, Tensor]], Mapping[str, Tensor]],
        sites: Sequence[Site] = (),
        description: str | None = None,
        *,
        reduce: Reduce = "mean",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Keep what a function makes of each batch, where :meth:`read` would keep too much; leaves the run as it was.

        Args:
            function: takes a batch, its logits ``(B, C)`` and activations ``{site: (B, N)}``; gives ``{name: (B, …)}``.
            sites, description, reduce: as :meth:`read`.

        Returns:
            positions ``(S,)`` and ``{name: (S, …)}`` of all processes, in the order of the data set.
        """
        position, rows, uneven = self._pass(function, sites, description, reduce, False, None, None)
        if uneven:
            raise UnevenRows(uneven)
        return position, rows

    def _pass(
        self,
        function: Callable[[Batch, Tensor, Mapping[str, Tensor]], Mapping[str, Tensor]],
        sites: Sequence[Site],
        description: str | None,
        reduce: Reduce,
        optional: bool,
        limit: int | None,
        only: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor], list[str]]:
        """Positions, rows, and names of columns that did not have one row per example in every batch."""
        index: list[Tensor] = []
        columns: dict[str, list[Tensor]] = {}
        unread: Exception | None = None
        with undisturbed(self.trainer, self.pl_module), ActivationReader(sites, reduce, optional=optional) as reader:
            try:
                for position, batch in self.examples(description, limit, only):
                    logits = apply_model(self.model, batch.x)
                    for name, values in function(batch, logits, reader.pop() if sites else {}).items():
                        columns.setdefault(name, []).append(values)
                    index.append(position)
            except Exception as error:
                unread = error
        if not self.trainer.strategy.reduce_boolean_decision(unread is None):  # all processes go the same way
            raise unread or ValueError("Another process could not read its batches.")
        if not index:
            raise ValueError("There are no examples to read.")
        sizes = [len(position) for position in index]
        uneven = [name for name, parts in columns.items() if [len(part) for part in parts] != sizes]
        here = torch.cat(index)
        rows = {
            name: gather_rows(self.trainer, here, torch.cat(parts))
            for name, parts in columns.items()
            if name not in uneven
        }
        return gather_rows(self.trainer, here, here), rows, uneven


class UnevenRows(ValueError):
    """Layers do not give one row per example."""

    def __init__(self, sites: Sequence[str]) -> None:
        super().__init__(
            f"The layers {', '.join(sites)} do not give one row per example: they run several times, or the first "
            "axis is not the batch (batch_first=False). Name others as probe_layers."
        )


class RunData:
    """What a run trains on and what it holds out, with its network and head.

    Args:
        trainer, pl_module: of the run.
        head: qualified name of the classification head; default the last linear layer that can be one.
        max_examples: at most this many training examples are read, evenly spaced.
        kept_back: positions in the training data set, ascending, of the held-out examples, which training must leave
            out; default the validation data.

    Attributes:
        train, held_out: the :class:`Split` of the (first) training and of the first validation loader; read one with
            :meth:`Split.read`.
        head_name, head: the classification head.
        model: what to call for logits.

    Raises:
        ValueError: no head is found, or no part of the module can be called for logits.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        head: str | None = None,
        max_examples: int | None = None,
        kept_back: Tensor | None = None,
    ) -> None:
        self.trainer, self.pl_module, self.max_examples = trainer, pl_module, max_examples
        self.kept_back = kept_back
        self.head_name, self.head = find_head(pl_module, head)
        self.model = model_with_head(pl_module, self.head)

    @property
    def train(self) -> Split:
        """The examples of the (first) training loader; refused if it is no ``DataLoader``."""
        loader, rest = train_loader(self.trainer), None
        if self.kept_back is not None:
            positions = positions_drawn_from(self.trainer, loader)
            rest = positions[~torch.isin(positions, self.kept_back)]
        return Split(self.trainer, self.pl_module, loader, self.model, self.max_examples, rest)

    @property
    def held_out(self) -> Split:
        """The examples that are kept back, or those of the first validation loader; refused if there is none."""
        if self.kept_back is not None:
            loader = train_loader(self.trainer)
            return Split(self.trainer, self.pl_module, loader, self.model, positions=self.kept_back)
        return Split(self.trainer, self.pl_module, held_out_loader(self.trainer), self.model)

    @property
    def is_stable(self) -> bool:
        """Whether both data sets have positions; a stream may give another order in each pass."""
        return self.train.has_positions and self.held_out.has_positions

    @property
    def head_input(self) -> Site:
        """What the head reads."""
        return Site(f"{self.head_name}:input", self.head, "input", self.head.in_features)

    @property
    def num_classes(self) -> int:
        """Number of classes of the head; a single logit stands for two."""
        return max(2, self.head.out_features)
