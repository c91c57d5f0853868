"""Where in a fit a hook is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn


def is_dry_run(trainer: pl.Trainer) -> bool:
    """Whether the run is a ``fast_dev_run``: its handful of batches may lack a class, so nothing can be traced."""
    return bool(getattr(trainer, "fast_dev_run", False))


def is_fit_validation(trainer: pl.Trainer) -> bool:
    """Whether a validation that runs is one of the fit, and not the check before it."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether the step that has just ended is the last one that is planned; a run may still be stopped before it."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if steps is not None and steps != -1 and trainer.global_step >= steps:
        return True
    last_epoch = epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs
    return bool(last_epoch and trainer.is_last_batch)


def resumed_within_epoch(trainer: pl.Trainer) -> bool:
    """Whether the run was resumed within an epoch, whose ``on_train_epoch_start`` Lightning then leaves out."""
    return bool(getattr(trainer.fit_loop, "restarted_mid_epoch", False))


def restart_workers(trainer: pl.Trainer) -> None:
    """Draw the epoch anew: its iterator was made before this hook, and its workers hold what the old sampler drew."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    iter(fetcher)


@contextmanager
def on_root_device(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Have the module on the device that it was trained on: when a fit has ended, Lightning has taken it off."""
    device = pl_module.device
    pl_module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        pl_module.to(device)


def kept_checkpoints(trainer: pl.Trainer) -> dict[str, float]:
    """The best and the last file of every checkpoint callback, with the time at which it was written."""
    callbacks: list[Any] = list(trainer.checkpoint_callbacks)
    named = {getattr(callback, name, "") for callback in callbacks for name in ("best_model_path", "last_model_path")}
    return {path: Path(path).stat().st_mtime for path in sorted(named) if path and Path(path).is_file()}
