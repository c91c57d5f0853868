"""Two processes whose results differ somewhere on the way must still end with one network and one record."""

import os
import subprocess
import sys
from pathlib import Path
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


@pytest.mark.slow
def test_processes_that_the_launcher_starts_do_what_one_process_does(tmp_path):
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "LOCAL_RANK"))}
    for devices, file in ((1, one), (2, two)):
        command = [sys.executable, str(Path(__file__).with_name("script_ddp.py")), str(devices), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    alone, *ranks = (torch.load(path, weights_only=True) for path in (one, f"{two}.0", f"{two}.1"))
    assert [content["world"] for content in (alone, *ranks)] == [1, 2, 2]
    assert _equal(ranks[0], ranks[1])
    groups, expected = ranks[0]["remover"]["groups"], alone["remover"]["groups"]
    assert torch.equal(groups["index"], expected["index"])  # of every example, by position
    assert torch.equal(groups["held_out"], expected["held_out"])
    assert groups["kind"] == expected["kind"] == "shortcut"
    # Trained in batches of other examples, the two may decide differently whether an ordinary head follows.
    records = [[r for r in content["remover"]["rounds"] if not r["ordinary"]] for content in (alone, ranks[0])]
    assert [(r["share"], r["weight"]) for r in records[1]] == [(r["share"], r["weight"]) for r in records[0]]
