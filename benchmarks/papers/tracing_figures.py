"""Figures of the tracing experiment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any


def lost(row: dict[str, Any], split: str) -> tuple[float, float]:
    """Accuracy lost by minority and by majority groups, in points."""
    delta, few = row[split]["delta"], set(row["minority"])
    points = [[100 * d for g, d in enumerate(delta) if (g in few) == flag] for flag in (True, False)]
    return mean(points[0]), mean(points[1])


def draw(changes: Sequence[dict[str, Any]], mine: Sequence[dict[str, Any]], data: str, out: Path) -> None:
    """Accuracy lost against the share of units zeroed, and the concentration over the epochs, as PNG files."""
    _draw_lost(changes, data, out / f"tracing_{data}.png")
    rows = [r for r in mine if r["part"] == "concentration"]
    if rows:
        _draw_concentration(rows, data, out / f"concentration_{data}.png")


def _draw_lost(changes: Sequence[dict[str, Any]], data: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, split in enumerate(("train", "test")):
        axes = figure.add_subplot(1, 2, i + 1)
        for j, score in enumerate(dict.fromkeys(r["score"] for r in changes)):
            points = []
            for share in sorted({r["share"] for r in changes}):
                gaps = [
                    lost(r, split)
                    for r in changes
                    if r["score"] == score and r["kind"] == "zero" and r["share"] == share
                ]
                if gaps:
                    points.append((100 * (share or 1e-4), mean(g[0] for g in gaps), mean(g[1] for g in gaps)))
            if points:
                x, few, many = zip(*points, strict=True)
                axes.plot(x, few, color=f"C{j}", marker="o", ms=3, label=score)
                axes.plot(x, many, color=f"C{j}", ls=":", marker=".", ms=3)
        axes.set_xscale("log")
        axes.set_xlabel("units zeroed (%)")
        axes.set_ylabel("accuracy lost (points)")
        axes.set_title(f"{data}, {split}: minority (solid), majority (dotted)")
        axes.axhline(0, color="grey", lw=0.5)
        if i == 0:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def _draw_concentration(rows: Sequence[dict[str, Any]], data: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for j, p in enumerate((1, 5, 10)):
        for of, style in (("minority", "-"), ("majority", ":")):
            epochs = sorted({r["epoch"] for r in rows})
            values = [
                [100 * r[f"top_{p}"] for r in rows if r["epoch"] == e and r["of"] == of] or [math.nan] for e in epochs
            ]
            axes.plot(
                epochs, [mean(v) for v in values], style, color=f"C{j}", marker="o", ms=3, label=f"top {p}%, {of}"
            )
    axes.set_xlabel("epoch")
    axes.set_ylabel("share of the units' effect (%)")
    axes.set_title(f"{data}: how concentrated")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
