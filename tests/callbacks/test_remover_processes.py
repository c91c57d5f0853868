"""Two processes whose results differ somewhere on the way must still end with one network and one record."""

from unittest import mock

import pytest
import torch
from test_every_callback import _equal, _KeepState
from test_remover import MANY, _fit, _loaders, _looks_twice

import demem.run.cure
import demem.run.detection
from demem.callbacks import MemorizationRemover


def _other_rounds(train, held_out, *args, **options):
    noisy = held_out._replace(features=held_out.features + torch.randn_like(held_out.features))
    return _rounds(train, noisy, *args, **options)


def _other_weights(model, parameters, *args, **options):
    result = _tune(model, parameters, *args, **options)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    return result


_rounds, _tune = demem.run.cure.remove_in_rounds, demem.run.cure.fine_tune
PATCHED = {
    "rounds": ("demem.run.cure.remove_in_rounds", _other_rounds),
    "fine-tuning": ("demem.run.cure.fine_tune", _other_weights),
    "has learned": ("demem.run.detection.class_error", lambda *_: 1.0),
}


class Drifts(MemorizationRemover):
    """On the second process, one step gives something else."""

    def __init__(self, what):
        super().__init__(shares=(0.5,))
        self.what, self.rank = what, 0

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        self.rank = trainer.global_rank
        if self.rank and self.what in PATCHED:
            mock.patch(*PATCHED[self.what]).start()

    def detect(self, features, y, num_classes):
        if self.rank and self.what == "site":
            features = dict(list(features.items())[-1:])
        probe = super().detect(features, y, num_classes)
        if self.rank and self.what == "groups":
            probe = probe._replace(logits=probe.logits.flip(1), error=0.01, found=True)
        return probe

    def choose(self, rounds, held_out, groups):
        return 1 + self.rank if self.what == "choice" else 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["site", "groups", "choice", *PATCHED])
def test_processes_that_differ_end_with_the_same_network(what, monkeypatch, tmp_path, two_processes):
    if what == "has learned":
        _looks_twice(monkeypatch)
    remover = Drifts(what)
    _fit(remover, epochs=3, callbacks=[_KeepState(remover, tmp_path)], loaders=_loaders(val=MANY), **two_processes)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["callback"]["fine_tuned_on"] > 0
    assert _equal(first, second)
