"""Infer groups, refit the head on them and print worst-group accuracy, in a training loop of plain PyTorch."""

import torch
from torch import nn

from demem.batch import Batch
from demem.data import make_spurious_digits
from demem.groups import find_shortcut, infer_groups
from demem.linear import fit_balanced
from demem.metrics import worst_group_accuracy
from demem.sites import find_sites
from demem.tracing import read_features


def main(epochs: int = 30) -> tuple[float, float]:
    torch.manual_seed(0)
    train, held_out, test = (Batch(*split.rows(torch.arange(len(split)))) for split in make_spurious_digits(seed=0))
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 2),
    )  # fmt: skip
    sites = find_sites(model, ["0", "2"])

    # Before training: the first layers predict the spurious attribute, and their mistakes are the minority.
    features, held_out_features = (read_features(model, sites, [split])[0] for split in (train, held_out))
    probe = find_shortcut(features, train.y, num_classes=2)
    groups = infer_groups(probe, train.y, held_out_features[probe.site], held_out.y)
    print(groups)

    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(epochs):
        for part in torch.randperm(len(train.y)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train.x[part]), train.y[part]).backward()
            optimizer.step()

    def worst() -> float:
        with torch.no_grad():
            return float(worst_group_accuracy(model(test.x), test.y, test.group))

    before = worst()
    with torch.no_grad():
        head = fit_balanced(model[:-1](held_out.x), held_out.y, groups.held_out)
        model[-1].weight.copy_(head.weight), model[-1].bias.copy_(head.bias)
    after = worst()
    print(f"test accuracy on the worst group: {before:.3f} as trained, {after:.3f} with the head refitted")
    return before, after


if __name__ == "__main__":
    main()
