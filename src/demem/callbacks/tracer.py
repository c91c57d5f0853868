"""Trace memorising units at the end of a fit and write a report; the model is left as it is."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from demem.batch import Batch, apply_model, batch_size
from demem.callbacks.figures import log_figures
from demem.report import check_writable
from demem.run import (
    Rows,
    RunData,
    UnevenRows,
    check_inputs,
    check_range,
    checks_version,
    held_out_loader,
    isolated_rng,
    names_itself,
    ranks_of,
    train_loader,
    undisturbed,
    with_version,
)
from demem.sites import (
    ActivationReader,
    Site,
    deciding_heads,
    default_sites,
    find_head,
    find_sites,
    named_layers,
)
from demem.tracing import (
    SCORES,
    RankedExamples,
    UnitReport,
    choose_atypical,
    contrast,
    linear_impact,
    linear_score,
    picture_grid,
    rank_examples,
    select_rows,
    trace,
    write_examples,
)

_TRIED = 32  # held-out examples, before training
_NEEDS_MISTAKES = "activation_difference"  # a few examples may have none, so this score is not tried on them


class MemorizationTracer(Callback):
    """Score every unit by what pruning it does to held-out atypical examples; changes nothing in the model.

    Beside a :class:`MemorizationRemover` it traces the network as training left it, before units are removed.

    Held-out examples are those of the first validation loader.  The report is a folder with

    * ``units.csv`` (or ``.parquet``): one row per unit with its site, number and every score, best first, and mean
      impacts on either kind of examples (positive: the unit helps them; :class:`~demem.tracing.UnitReport`);
    * ``units.png``: the unit map, impact on typical against impact on atypical examples, by the first score that has
      impacts (``taylor``: :mod:`demem.tracing.taylor`; ``two_step`` has none);
    * ``memorised_examples.csv`` and ``.png``: the training examples that stand against what the memorising units of the
      head's input say (:func:`demem.tracing.memorization_score`), with their index in the training set, and
      pictures of the first ones.

    Args:
        layers: patterns of sites, see :mod:`demem.sites`; ``None`` watches blocks or stages and the head's input.
        scores: names in ``demem.tracing.SCORES``; the first one orders the table.
        atypical: who is atypical, among the held-out examples: the ``share`` of each class with the lowest ``"margin"``
            or highest ``"loss"``, the misclassified (``"error"``), or minority groups (``"group"``: needs groups in the
            batches).
        share: of each class, for ``"margin"`` and ``"loss"``.
        top_k: units reported as the top and marked in the figure.
        every_n_epochs: also trace every so many epochs; ``None`` only at the end of the fit.
        max_examples: traced at most, half of them atypical; ``None`` for all held-out examples.
        memorised: how many training examples to list; 0 skips the pass over the training set.
        head: qualified name of the classification head, if it cannot be found automatically.
        dirpath: where to write; ``memorization`` in the logger's folder (or ``default_root_dir``) if ``None``.
        table: file format of the unit table.

    Attributes:
        report: the last :class:`~demem.tracing.UnitReport`.
        memorised_examples: the last :class:`~demem.tracing.RankedExamples`.
        history: one dict for each report: ``epoch``, ``score`` and the top units as ``[site, unit, score]``.

    Raises:
        ValueError: before training: an unknown score, layers that match nothing, no held-out data, groups asked for but
            not there, a folder that cannot be made, or a network in which a few examples cannot be traced.  What fails
            after training (logits that are NaN, a full disk) warns.
    """

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        scores: Sequence[str] = ("two_step", "taylor"),
        atypical: Literal["margin", "loss", "error", "group"] = "margin",
        share: float = 0.2,
        top_k: int = 20,
        every_n_epochs: int | None = None,
        max_examples: int | None = 1024,
        memorised: int = 32,
        head: str | None = None,
        dirpath: str | None = None,
        table: Literal["csv", "parquet"] = "csv",
    ) -> None:
        super().__init__()
        scores = [scores] if isinstance(scores, str) else list(scores)
        unknown = sorted(set(scores) - set(SCORES))
        if unknown or not scores:
            raise ValueError(f"Unknown scores {unknown}; name some of {sorted(SCORES)}.")
        if atypical not in ("margin", "loss", "error", "group"):
            raise ValueError(f"atypical must be margin, loss, error or group, got {atypical!r}.")
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}.")
        if top_k < 1 or memorised < 0 or (every_n_epochs is not None and every_n_epochs < 1):
            raise ValueError("top_k and every_n_epochs must be at least 1, memorised at least 0.")
        if max_examples is not None and max_examples < 2:
            raise ValueError(f"max_examples must be at least 2, got {max_examples}.")
        if table not in ("csv", "parquet"):
            raise ValueError(f"table must be csv or parquet, got {table!r}.")
        self.layers = layers
        self.scores = scores
        self.atypical: Literal["margin", "loss", "error", "group"] = atypical
        self.share = share
        self.top_k = top_k
        self.every_n_epochs = every_n_epochs
        self.max_examples = max_examples
        self.memorised = memorised
        self.head = head
        self.dirpath = dirpath
        self.table: Literal["csv", "parquet"] = table
        self.report: UnitReport | None = None
        self.memorised_examples: RankedExamples | None = None
        self.history: list[dict[str, Any]] = []
        self._traced_step = -1

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            layers=self.layers, scores=self.scores, atypical=self.atypical, share=self.share, dirpath=self.dirpath
        )

    @with_version
    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "traced_step": self._traced_step}

    @checks_version
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])
        self._traced_step = int(state_dict["traced_step"])

    @names_itself
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _sites(pl_module, self.layers, self.head)  # errors now rather than after training
        RunData(trainer, pl_module, self.head)
        if trainer.limit_val_batches == 0 or not trainer.enable_validation:
            held_out_loader(trainer)

    @names_itself
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = RunData(trainer, pl_module, self.head)
        check_inputs(data)
        self._try(data)
        folder = self._folder(trainer)
        if trainer.is_global_zero:
            check_writable(folder)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        every = self.every_n_epochs
        if every is not None and (trainer.current_epoch + 1) % every == 0:
            self._trace_if_possible(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._traced_step != trainer.global_step:
            epoch = max(0, trainer.current_epoch - 1)  # it counts finished epochs by now
            self._trace_if_possible(trainer, pl_module, epoch)

    def _try(self, data: RunData) -> None:
        """Trace a few examples now, so that a network that cannot be traced is refused before it is trained."""
        trainer = data.trainer
        with undisturbed(trainer, data.pl_module):
            batch = next((batch for _, batch in data.held_out.examples()), None)
            if not trainer.strategy.reduce_boolean_decision(batch is not None) or batch is None:
                raise ValueError(
                    "A process has no held-out examples, and tracing needs some on each: give every process validation "
                    "batches."
                )
            if self.atypical == "group" and batch.group is None:
                raise ValueError("atypical='group' needs groups, but the validation batches carry none.")
            check_range(batch.y, data.num_classes, "validation")
            few = batch
            with suppress(ValueError):  # not all batches can be taken apart
                few = select_rows(batch, torch.arange(min(_TRIED, batch_size(batch))))
            everyone = torch.ones(batch_size(few), dtype=torch.bool)
            sites = self._sites_that_run(data, data.head_name, few.x)
            scores = [score for score in self.scores if score != _NEEDS_MISTAKES]
            trace(data.model, sites, [few], everyone, scores=scores, ranks=ranks_of(trainer))

    def _trace_if_possible(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        """Write the report on the network as training left it; what fails by now must not cost the run."""
        with ExitStack() as stack:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if hasattr(callback, "as_trained"):
                    stack.enter_context(callback.as_trained(pl_module))
            try:
                self._trace(trainer, pl_module, epoch)
            except Exception as error:
                rank_zero_warn(f"MemorizationTracer writes no report, because {type(error).__name__}: {error}")

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "memorization")

    def _sites_that_run(self, data: RunData, head: str, x: Any) -> list[Site]:
        sites = _sites(data.pl_module, self.layers, head)
        if self.layers is not None:
            return sites
        with ActivationReader(sites, optional=True) as reader:
            apply_model(data.model, x)
            ran = reader.pop()
        return [site for site in sites if site.name in ran]

    def _trace(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        data = RunData(trainer, pl_module, self.head)
        with undisturbed(trainer, pl_module):
            batches, mask = self._select(data)
            heads = trainer.strategy.broadcast(_deciding_heads(data, batches[0].x))
            head = data.head_name
            if self.head is None and heads and head not in heads:  # the last layer in the code serves another purpose
                head = heads[-1]
            sites = self._sites_that_run(data, head, batches[0].x)
            self.report = trace(data.model, sites, batches, mask, scores=self.scores, ranks=ranks_of(trainer))
            self.memorised_examples = None
            if self.memorised and head in heads:
                self.memorised_examples = self._rank_training_set(RunData(trainer, pl_module, head))
            elif self.memorised:
                rank_zero_warn(f"{head!r} does not give the logits by itself, so training examples are not ranked.")
        self._traced_step = trainer.global_step
        self.history.append({"epoch": epoch, "score": self.scores[0], "top": self._top(self.report)})
        folder = self._folder(trainer)  # asks all processes
        if trainer.is_global_zero:
            with isolated_rng():  # the pictures go through the data set's random transforms
                self._write(trainer, folder, epoch)

    def _top(self, report: UnitReport) -> list[list[Any]]:
        """``[site, unit, score]`` of the top units by the first score, the highest first."""
        values = report.columns[self.scores[0]]
        top = report.top(self.scores[0], min(self.top_k, sum(len(v) for v in values.values())))
        rows = [[site, int(u), float(values[site][u])] for site, units in top.items() for u in units]
        return sorted(rows, key=lambda row: -row[2])

    def _atypical(self, data: RunData, rows: Rows) -> Tensor:
        counts = getattr(getattr(data.trainer, "datamodule", None), "train_group_counts", None)
        if rows.logits is None:
            raise ValueError("The logits have not been read.")
        return choose_atypical(
            self.atypical,
            rows.logits,
            rows.y,
            rows.group,
            share=self.share,
            group_counts=None if counts is None else torch.as_tensor(counts),
        )

    def _select(self, data: RunData) -> tuple[list[Batch], Tensor]:
        """This process's share of the traced examples, and which of them are atypical."""
        rows = data.held_out.read(description="Choosing atypical examples", logits=True)
        atypical = self._atypical(data, rows)
        wanted = _spread(atypical, self.max_examples)
        position, atypical = rows.position[wanted].cpu(), atypical[wanted].cpu()
        parts = list(data.held_out.examples("Reading the traced examples", only=position))
        mask = torch.cat([atypical[torch.searchsorted(position, here)] for here, _ in parts] or [atypical[:0]])
        ready = torch.tensor([float(bool(mask.any()))], device=data.pl_module.device)
        if float(ranks_of(data.trainer).total(ready)) < data.trainer.world_size:
            raise ValueError(
                "A process has no atypical example to trace: use more held-out examples or a larger share."
            )
        return [batch for _, batch in parts], mask

    def _rank_training_set(self, data: RunData) -> RankedExamples | None:
        """Units of the head's input that hurt the atypical held-out examples, against the others, on training data."""
        site = data.head_input
        try:
            rows = data.held_out.read([site], "Reading the head's input", reduce="auto", logits=True)
        except UnevenRows:
            rank_zero_warn(
                f"{data.head_name!r} reads more than one row per example, so training examples are not ranked."
            )
            return None
        z, weight = rows.activations[site.name], data.head.weight.detach().float()
        memorising = linear_score(z, weight, rows.y, self._atypical(data, rows), logits=rows.logits) > 0
        if not bool(memorising.any()) or bool(memorising.all()):
            return None
        centre = z.mean(0)

        def contributions(batch: Batch, logits: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
            impact = linear_impact(seen[site.name].float(), weight, batch.y, logits=logits.float(), centre=centre)
            kept, masked = impact[:, ~memorising].sum(1), impact[:, memorising].sum(1)
            return {"kept": kept, "masked": masked, "y": batch.y}

        try:
            position, sums = data.train.map(contributions, [site], "Ranking training examples", reduce="auto")
        except (TypeError, ValueError) as error:
            rank_zero_warn(f"The training batches cannot be read, so training examples are not ranked. {error}")
            return None
        score = contrast(sums["kept"], sums["masked"])
        return rank_examples(score.cpu(), sums["y"].cpu(), self.memorised, position.cpu())

    def _write(self, trainer: pl.Trainer, folder: Path, epoch: int) -> None:
        if self.report is None:
            return
        if self.every_n_epochs is not None:
            folder = folder / f"epoch={epoch}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for write in (self._write_tables, self._write_pictures):  # tables stay where pictures cannot be drawn
                with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
                    write(trainer, self.report, Path(part))
                    for file in Path(part).iterdir():  # whole or not at all
                        file.replace(folder / file.name)
            mapped = self._mapped(self.report)
            log_figures(trainer, {"demem/traced_units": partial(self.report.draw, mapped, self.top_k, self.scores[0])})
        except OSError as error:
            raise RuntimeError(f"The tracing report cannot be written to {folder}: {error}") from error
        rank_zero_info(f"demem: tracing report in {folder}")

    def _write_tables(self, trainer: pl.Trainer, report: UnitReport, folder: Path) -> None:
        if self.table == "csv":
            report.to_csv(folder / "units.csv")
        else:
            report.to_parquet(folder / "units.parquet")
        if self.memorised_examples is not None:
            write_examples(self.memorised_examples, folder / "memorised_examples.csv")

    def _write_pictures(self, trainer: pl.Trainer, report: UnitReport, folder: Path) -> None:
        report.figure(folder / "units.png", self._mapped(report), self.top_k, self.scores[0])
        if self.memorised_examples is not None:
            self._picture(trainer, self.memorised_examples, folder / "memorised_examples.png")

    def _mapped(self, report: UnitReport) -> str | None:
        """The score that the map of the units shows: the first with impacts."""
        return next((s for s in self.scores if f"impact_typical/{s}" in report.columns), None)

    def _picture(self, trainer: pl.Trainer, ranked: RankedExamples, path: Path) -> None:
        dataset = train_loader(trainer).dataset
        images, titles = [], []
        first = (v[:64].tolist() for v in (ranked.position, ranked.label, ranked.score))
        for position, label, score in zip(*first, strict=True):
            try:
                item = dataset[position]
            except (TypeError, IndexError, NotImplementedError):
                return  # an iterable data set cannot be asked for one example
            image = item[0] if isinstance(item, list | tuple) else item.get("x", item.get("image"))
            if not isinstance(image, Tensor) or image.ndim not in (2, 3):
                return
            images.append(image if image.ndim == 3 else image[None])
            titles.append(f"#{position} class {label}: {score:.1f}")
        if images and all(i.shape == images[0].shape for i in images):
            picture_grid(torch.stack(images), titles, path)


def _sites(pl_module: pl.LightningModule, layers: str | Sequence[str] | None, head: str | None) -> list[Site]:
    find_head(pl_module, head)
    return default_sites(pl_module, head) if layers is None else find_sites(pl_module, layers)


def _deciding_heads(data: RunData, x: Any) -> list[str]:
    """By their names in the whole module, also where only a part of it is called."""
    layers = named_layers(data.model)
    found = [layers[name] for name in deciding_heads(data.model, x)]
    return [name for name, layer in named_layers(data.pl_module).items() if any(layer is head for head in found)]


def _spread(atypical: Tensor, limit: int | None) -> Tensor:
    """At most ``limit`` examples, evenly over the data set, half of them atypical as far as there are enough."""
    wanted = torch.ones_like(atypical)
    if limit is None or len(atypical) <= limit:
        return wanted
    for flag, quota in ((True, limit // 2), (False, limit - min(limit // 2, int(atypical.sum())))):
        members = (atypical == flag).nonzero()[:, 0]
        if len(members) > quota:
            wanted[members] = False
            wanted[members[torch.linspace(0, len(members) - 1, quota).round().long()]] = True
    return wanted
