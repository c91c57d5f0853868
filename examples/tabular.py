"""Rows of numbers: made-up loans whose outcome depends on two columns and usually goes with a third, the branch."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from demem.callbacks import MemorizationRemover, WorstGroupMonitor
from demem.module import Classifier
from demem.report import ReportOptions

COLUMNS = ["income", "debt", "age", "branch"]


def rows(size: int, agreement: float, seed: int) -> TensorDataset:
    """A debt that does not fit the income decides; the branch agrees with the outcome for a share of the rows."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (size,), generator=draw)
    branch = torch.where(torch.rand(size, generator=draw) < agreement, y, 1 - y)
    income, age, noise, blur = torch.randn(4, size, generator=draw)
    too_much_or_too_little = 3.0 * torch.randint(2, (size,), generator=draw) - 1.5
    x = torch.stack([income, income + y * too_much_or_too_little + 0.35 * noise, age, 4 * branch - 2 + 0.5 * blur], 1)
    return TensorDataset(x, y, 2 * y + branch)


def main(epochs: int = 10, folder: str = "results/tabular") -> tuple[float, float, MemorizationRemover]:
    train, held_out, test = rows(2000, 0.95, 0), rows(600, 0.5, 1), rows(2000, 0.5, 2)

    def worst_of_test(callbacks: list) -> float:
        pl.seed_everything(0)
        network = Classifier(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), lr=0.02)
        monitor = WorstGroupMonitor()
        trainer = pl.Trainer(max_epochs=epochs, callbacks=[*callbacks, monitor], default_root_dir=folder)
        trainer.fit(network, DataLoader(train, 64, shuffle=True), DataLoader(held_out, 256))
        return trainer.test(network, DataLoader(test, 256), verbose=False)[0]["test/worst_group_acc"]

    options = ReportOptions(
        class_names=["repaid", "defaulted"], attribute_names=["branch A", "branch B"], feature_names=COLUMNS
    )
    remover = MemorizationRemover(report=options)
    before, after = worst_of_test([]), worst_of_test([remover])
    print(remover.summary())
    print(f"test accuracy on the worst group: {before:.3f} trained as usual, {after:.3f} with demem")
    return before, after, remover


if __name__ == "__main__":
    main()
