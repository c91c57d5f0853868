"""Figures of the measures experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.papers.measures import Series


def draw(out: Path, runs: list[dict[str, Any]], every: Sequence[Series]) -> None:
    """Distributions of both measures by level, and their course over the epochs of one run, as PNG files."""
    import torch

    from demem.measures import Diversity, plot_diversity, plot_history

    for series in every:
        saved = {level: out / f"{series.name}_{level}.pt" for level in series.levels}
        if all(path.is_file() for path in saved.values()):
            loaded = {str(level): torch.load(path, weights_only=True) for level, path in saved.items()}
            shown = {n: Diversity(s["entropy"], s["mi"], s["units"], s["samples"]) for n, s in loaded.items()}
            figure, _ = plot_diversity(shown)
            figure.suptitle(series.name.replace("_", " "))
            figure.savefig(out / f"{series.name}.png", dpi=120)
    epochs = [r["epochs"] for r in runs if r["experiment"] == "waterbirds_epochs"]
    if epochs:
        curves = {}
        for name in ("diversity/entropy", "diversity/mi"):
            curves[name] = [sum(e[i][name] for e in epochs) / len(epochs) for i in range(len(epochs[0]))]
        curves["memorization gap (fraction)"] = [
            sum(min(e[i]["train_group_acc"]) - min(e[i]["test_group_acc"]) for e in epochs) / len(epochs)
            for i in range(len(epochs[0]))
        ]
        figure, _ = plot_history(curves, x=range(1, len(epochs[0]) + 1))
        figure.savefig(out / "waterbirds_epochs.png", dpi=120)
