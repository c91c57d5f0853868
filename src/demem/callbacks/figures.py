"""Hand figures to the loggers that take some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figures(trainer: pl.Trainer, figures: Mapping[str, Callable[[], Figure | None]]) -> None:
    """Draw figures for every logger that takes some: ``experiment.add_figure`` (TensorBoard) or ``log_image`` (Weights
    & Biases and others); others are left alone, and nothing is drawn for them."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        for name, draw in figures.items():
            try:
                _log(logger, name, draw, trainer.global_step)
            except Exception as error:  # a picture is not worth a run
                rank_zero_warn(f"{type(logger).__name__} did not take the figure {name}: {error}")


def _log(logger: Any, name: str, draw: Callable[[], Figure | None], step: int) -> None:
    image = hasattr(logger, "log_image")
    figure = draw() if image or hasattr(logger.experiment, "add_figure") else None
    if figure is None:
        return
    if image:
        logger.log_image(key=name, images=[_pixels(figure)], step=step)
    else:
        logger.experiment.add_figure(name, figure, global_step=step)


def _pixels(figure: Figure) -> Any:
    """``(H, W, 3)`` uint8."""
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
