"""Figures and scalars in loggers."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger, Logger
from test_report import KINDS, fit

from demem.callbacks import ActivationDiversityMonitor, MemorizationRemover, MemorizationTracer


class _Own(Logger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.figures, self.scalars = {}, {}

    name, version = "own", 0

    def log_metrics(self, metrics, step=None):
        self.scalars |= metrics

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class LikeTensorBoard(_Own):
    @property
    def experiment(self):
        def add_figure(tag, figure, global_step=None):
            assert isinstance(figure, Figure)
            self.figures[tag] = global_step

        return SimpleNamespace(add_figure=add_figure)


class LikeWandb(_Own):
    experiment = object()

    def log_image(self, key, images, step=None):
        (image,) = images
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert image.min() < image.max()
        self.figures[key] = step


class LikeOthers(_Own):
    experiment = object()


def _callbacks(folder):
    return [ActivationDiversityMonitor(max_units=8), MemorizationTracer(scores="taylor", dirpath=str(folder))]


@pytest.mark.parametrize("make", [LikeTensorBoard, LikeWandb])
def test_figures_go_to_loggers_that_take_some(tmp_path, make):
    logger = make()
    fit(tmp_path, *KINDS["pictures"], callbacks=_callbacks(tmp_path), logger=logger)
    assert set(logger.figures) == {
        "demem/unit_map",
        "demem/memorised_examples",
        "demem/diversity",
        "demem/traced_units",
    }
    assert set(logger.figures.values()) == {3 * 19}


def test_other_loggers_are_left_alone(tmp_path, recwarn):
    fit(tmp_path, *KINDS["rows"], logger=LikeOthers())
    fit(tmp_path, *KINDS["rows"], logger=CSVLogger(tmp_path))
    assert not [w for w in recwarn if "figure" in str(w.message)]


def test_a_logger_that_fails_costs_no_report(tmp_path):
    class Full(LikeWandb):
        def log_image(self, key, images, step=None):
            raise OSError("no space left")

    with pytest.warns(UserWarning, match="Full did not take the figure demem/unit_map: no space left"):
        fit(tmp_path, *KINDS["rows"], logger=Full())
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("known", [False, True])
def test_scalars_say_whose_groups_and_who_judged_them(tmp_path, known):
    logger = _Own()
    remover = MemorizationRemover(use_groups=known)
    fit(tmp_path, *KINDS["pictures"], remover=remover, logger=logger, log_every_n_steps=1)
    whose = "given" if known else "inferred"
    kept = next(r for r in remover.rounds if r.chosen)
    assert kept.refitted
    assert logger.scalars[f"removal/as_trained_worst_{whose}_group_acc"] == pytest.approx(remover.rounds[0].worst)
    assert logger.scalars[f"removal/crossfitted_worst_{whose}_group_acc"] == pytest.approx(kept.worst)
    assert logger.scalars["removal/held_out_labels_used"] == 1
    assert logger.scalars["removal/as_trained_held_out_acc"] == pytest.approx(remover.rounds[0].average)
    assert logger.scalars["removal/crossfitted_held_out_acc"] == pytest.approx(kept.average)
    other = "inferred" if known else "given"
    assert not any(f"removal/as_trained_worst_{other}" in name for name in logger.scalars)


def test_the_summary_is_said_once_at_the_end(tmp_path, caplog):
    with caplog.at_level("INFO"), warnings.catch_warnings():
        remover = fit(tmp_path, *KINDS["rows"])
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("demem: verdict")]
    assert said == [remover.summary()]
