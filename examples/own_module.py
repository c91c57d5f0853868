"""A LightningModule of one's own with its own batches: add two callbacks, and nothing else changes."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from demem.callbacks import MemorizationRemover, WorstGroupMonitor
from demem.data import make_spurious_digits


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.body(x))

    def unpack_batch(self, batch):  # the only method that demem asks for, as these batches have a form of their own
        return batch["pixels"], batch["digit_class"], batch["ink_group"]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["pixels"]), batch["digit_class"])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch["pixels"]), batch["digit_class"]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def loaders() -> list[DataLoader]:
    sets = [
        [{"pixels": x, "digit_class": y, "ink_group": group} for x, y, group in (split[i] for i in range(len(split)))]
        for split in make_spurious_digits(seed=0)[:2]  # training and validation
    ]
    return [DataLoader(examples, 64, shuffle=i == 0) for i, examples in enumerate(sets)]


def main(epochs: int = 20, folder: str = "results/own_module") -> tuple[MemorizationRemover, WorstGroupMonitor]:
    pl.seed_everything(0)
    remover, monitor = MemorizationRemover(report="report.html"), WorstGroupMonitor()
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[remover, monitor], default_root_dir=folder)
    trainer.fit(Digits(), *loaders())
    print(remover.summary())
    return remover, monitor


if __name__ == "__main__":
    main()
