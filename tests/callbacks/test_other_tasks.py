"""Tasks that are not single-label classification are refused before training, by every callback that needs labels."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from demem.callbacks import ActivationDiversityMonitor, MemorizationRemover, MemorizationTracer, WorstGroupMonitor


class _Module(pl.LightningModule):
    def __init__(self, network, loss):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class _Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.embedding(x))


def _mlp(outputs):
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))


X, TOKENS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64 * 5).view(64, 5) % 20
IMAGES = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(0))
NOT_INDICES, NO_HEAD = "Labels must be class indices", "No nn.Linear was found"
TASKS = {  # network, loss, inputs, targets, what is said
    "regression": (lambda: _mlp(1), lambda o, t: F.mse_loss(o[:, 0], t), X, X[:, 0], NOT_INDICES),
    "several targets": (lambda: _mlp(2), F.mse_loss, X, X[:, :2], NOT_INDICES),
    "counts": (
        lambda: _mlp(1),
        lambda o, t: F.mse_loss(o[:, 0], t.float()),
        X,
        torch.arange(64),
        r"out of range: the head has 2|target must lie in 0 … 1",
    ),
    "multi-label": (
        lambda: _mlp(3),
        lambda o, t: F.binary_cross_entropy_with_logits(o, t.float()),
        X,
        (X[:, :3] > 0).long(),
        NOT_INDICES,
    ),
    "segmentation": (
        lambda: nn.Conv2d(1, 2, 3, padding=1),
        F.cross_entropy,
        IMAGES,
        (IMAGES[:, 0] > 0).long(),
        f"{NOT_INDICES}|{NO_HEAD}",
    ),
    "tokens": (_Tagger, lambda o, t: F.cross_entropy(o.transpose(1, 2), t), TOKENS, TOKENS % 3, NOT_INDICES),
    "a logit of each token, one label": (
        _Tagger,
        lambda o, t: F.cross_entropy(o.mean(1), t),
        TOKENS,
        torch.arange(64) % 3,
        r"Logits must have the shape \(B, C\)|saw no predictions",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("callback", [MemorizationRemover, MemorizationTracer, WorstGroupMonitor])
@pytest.mark.parametrize("task", TASKS)
def test_a_task_without_one_label_for_each_example_is_refused_before_training(task, callback, tmp_path):
    network, loss, x, y, message = TASKS[task]
    trainer = _trainer(callback(), tmp_path)
    data = DataLoader(TensorDataset(x, y), batch_size=16)
    with pytest.raises((ValueError, RuntimeError), match=message):
        trainer.fit(_Module(network(), loss), data, data)
    assert trainer.global_step == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", [name for name in TASKS if name != "segmentation"])
def test_diversity_needs_no_labels(task, tmp_path):
    network, loss, x, y, _ = TASKS[task]
    trainer = _trainer(ActivationDiversityMonitor(), tmp_path)
    data = DataLoader(TensorDataset(x, y), batch_size=16)
    trainer.fit(_Module(network(), loss), data, data)
    assert trainer.global_step == 4


def _trainer(callback, folder):
    return pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
    )
