"""When a report of the remover's run is made: what it reads before and after the cure, and where it goes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from demem.callbacks.diversity import ActivationDiversityMonitor
from demem.callbacks.figures import log_figures
from demem.groups import Groups
from demem.removal import Examples, Round, RoundRecord
from demem.report import (
    ReportData,
    ReportOptions,
    check_writable,
    example_sheet,
    load,
    render,
    save,
    unit_map,
    write_whole,
)
from demem.run import Before, RunData, observe_after, observe_before, observe_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from demem.callbacks.remover import MemorizationRemover

Choose = Callable[[Sequence[Round], Examples, Groups], int]
Hook = TypeVar("Hook", bound=Callable[..., None])


class Reporter:
    """Watches one remover, and writes its report at the end of the fit.

    Whatever fails here warns, and costs the run nothing.

    Args:
        report: where to write, or all options; ``None`` writes no report and reads nothing.

    Attributes:
        options: ``None`` if no report is asked for.
        path: of the report that was written.
        seconds: of the remover's hooks in this fit, and of the passes for the report.
    """

    def __init__(self, report: str | Path | ReportOptions | None) -> None:
        self.options = ReportOptions(str(report)) if isinstance(report, str | Path) else report
        self.path: Path | None = None
        self.start()

    def start(self) -> None:
        """Begin a fit."""
        self.began, self.seconds, self.own_seconds = time.perf_counter(), 0.0, 0.0
        self._before: Before | None = None
        self._rounds: Sequence[Round] = ()

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse a place where nothing can be written, before training; every process must call this."""
        folder = run_folder(trainer)
        if self.options is not None and trainer.is_global_zero:
            check_writable((folder / self.options.path).parent)

    def watching(self, choose: Choose, data: RunData) -> Choose:
        """``choose``, which also looks at the network as it is trained when it is called."""

        def chosen(rounds: Sequence[Round], held_out: Examples, groups: Groups) -> int:
            if self.options is not None:
                began, self._before, self._rounds = time.perf_counter(), None, rounds
                try:
                    self._before = observe_before(data, rounds[0].head, held_out, groups.typical)
                except Exception as error:
                    _warn(error)
                self.own_seconds += time.perf_counter() - began
            return choose(rounds, held_out, groups)

        return chosen

    def finish(
        self, remover: MemorizationRemover, data: RunData, positions: Tensor, trained: Mapping[str, Tensor]
    ) -> None:
        """Read the network as it is now, and write and log the report; every process must call this.

        Args:
            remover: whose run it is.
            data: of the run.
            positions: ``(S,)`` of the training examples that have a group.
            trained: the parameters that the cure changed, as they were before.
        """
        options, self.path = self.options, None
        if options is None or remover.groups is None:
            return
        began = time.perf_counter()
        try:
            found = self._collect(remover, remover.groups, data, positions, trained, options)
            folder = run_folder(data.trainer)
            self.own_seconds += time.perf_counter() - began
            if data.trainer.is_global_zero:
                found = replace(found, report_seconds=self.own_seconds, fit_seconds=time.perf_counter() - self.began)
                self.path = _write(found, folder / options.path, trained)
                log_report(data.trainer, found)
        except Exception as error:
            _warn(error)
        self._before, self._rounds = None, ()

    def _collect(
        self,
        remover: MemorizationRemover,
        groups: Groups,
        data: RunData,
        positions: Tensor,
        trained: Mapping[str, Tensor],
        options: ReportOptions,
    ) -> ReportData:
        kept = next((i for i, record in enumerate(remover.rounds) if record.chosen), 0)
        if self._before is None:
            note = "The network as trained was not read, so there are no accuracies, examples and units."
            found = replace(observe_run(data, groups, options), notes=[note])
        else:
            round_ = self._rounds[kept] if kept else None
            found = observe_after(data, groups, positions, self._before, round_, trained, options)
        monitors = [c for c in data.trainer.callbacks if isinstance(c, ActivationDiversityMonitor)]  # type: ignore[attr-defined]
        return replace(
            found,
            rebalanced=remover.rebalance and groups.informative,
            rounds=list(remover.rounds),
            fine_tuned_on=remover.fine_tuned_on,
            failed=not remover.rounds,
            epochs=data.trainer.current_epoch,
            callback_seconds=max(0.0, self.seconds - self.own_seconds),
            diversity=[dict(row) for row in monitors[0].history] if monitors else [],
        )


def _write(found: ReportData, path: Path, trained: Mapping[str, Tensor]) -> Path:
    if trained:
        file = BytesIO()
        torch.save(dict(trained), file)
        undo = write_whole(path.with_suffix(".before.pt"), file.getvalue())
        found = replace(found, undo=undo.name)
    told = load(save(found, path.with_suffix(".json")))  # what is rendered again later is the same
    return write_whole(path, render(told))


def scalars(rounds: Sequence[RoundRecord], groups_known: bool) -> dict[str, float]:
    """What is logged of the cure, under names that say whose groups they are and who judged them.

    ``removal/as_trained_worst_inferred_group_acc`` is of the network as trained, ``removal/crossfitted_…`` of heads
    that were refitted without the examples that they judge; ``given`` stands for ``inferred`` where groups were given.
    ``removal/held_out_labels_used`` is 1 where the refit was kept: accuracies of the same epoch under ``val/`` are then
    of a network that has seen these labels.
    """
    kept = next((record for record in rounds if record.chosen and not math.isnan(record.worst)), None)
    if kept is None:
        return {}
    name = f"worst_{'given' if groups_known else 'inferred'}_group_acc"
    values = {
        "removal/masked_share": kept.share,
        "removal/held_out_labels_used": float(kept.refitted),
        f"removal/as_trained_{name}": rounds[0].worst,
    }
    if kept.refitted:
        values[f"removal/crossfitted_{name}"] = kept.worst
    for prefix, record in (("as_trained", rounds[0]), ("crossfitted", kept if kept.refitted else None)):
        if record is not None and record.average is not None:
            values[f"removal/{prefix}_held_out_acc"] = record.average
    return values


def timed(hook: Hook) -> Hook:
    """Add the seconds of a hook of the remover to those of its reporter."""

    @wraps(hook)
    def wrapped(remover: Any, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        try:
            hook(remover, *args, **kwargs)
        finally:
            remover.reporter.seconds += time.perf_counter() - began

    return wrapped  # type: ignore[return-value]


def run_folder(trainer: pl.Trainer) -> Path:
    """The logger's folder, or ``default_root_dir``; every process must call this."""
    return Path(trainer.log_dir or trainer.default_root_dir or os.getcwd())


def log_report(trainer: pl.Trainer, found: ReportData) -> None:
    """Log the unit map and memorised examples as figures; the diversity monitor logs its own."""
    figures: dict[str, Callable[[], Figure | None]] = {
        "demem/unit_map": lambda: unit_map(found.units) if found.units else None,
        "demem/memorised_examples": lambda: example_sheet(found, "memorised"),
    }
    log_figures(trainer, figures)


def _warn(error: Exception) -> None:
    rank_zero_warn(
        f"MemorizationRemover could not write its report, because {type(error).__name__}: {error}. The network is not "
        "affected."
    )
