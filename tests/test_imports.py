"""``import demem`` and the four callbacks need nothing but torch, Lightning and torchmetrics."""

import subprocess
import sys

import pytest

# Lightning and torch import some of these by themselves where they are installed, so they come first.
RUN = """
import importlib.abc, sys
import pytorch_lightning as pl, torch
from torch.utils.data import DataLoader, TensorDataset
BLOCKED = set(sys.argv[1].split(","))
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in [name for name in sys.modules if name.partition(".")[0] in BLOCKED]:
    del sys.modules[name]
sys.meta_path.insert(0, Block())

import demem, demem.callbacks
from demem.module import Classifier

def rows(n):
    y = torch.arange(n) % 2
    shortcut = torch.where(torch.arange(n) % 20 < 18, y, 1 - y)
    x = torch.randn(n, 6)
    x[:, 0] += 2 * y
    x[:, 1] += 5 * shortcut
    return TensorDataset(x, y, 2 * y + shortcut)

net = Classifier(torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)))
callbacks = [demem.MemorizationRemover(), demem.WorstGroupMonitor(), demem.ActivationDiversityMonitor()]
callbacks += [demem.MemorizationTracer(scores="taylor", dirpath=sys.argv[2])]
trainer = pl.Trainer(
    max_epochs=2, callbacks=callbacks, accelerator="cpu", logger=False, enable_progress_bar=False,
    enable_checkpointing=False, enable_model_summary=False,
)
trainer.fit(net, DataLoader(rows(300), 32, shuffle=True), DataLoader(rows(200), 32))
assert callbacks[0].groups is not None and callbacks[0].rounds
assert all(callback.history for callback in callbacks[1:])
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
"""
OPTIONAL = "timm,wilds,transformers,torchvision,sklearn,pandas,jinja2,PIL"


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [OPTIONAL, OPTIONAL + ",matplotlib"])
def test_callbacks_run_without_what_they_do_not_need(blocked, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUN, blocked, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "units.csv").is_file()


def test_importing_demem_imports_nothing_heavy():
    code = "import sys, demem; print([n for n in ('torch', 'pytorch_lightning', 'matplotlib') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
