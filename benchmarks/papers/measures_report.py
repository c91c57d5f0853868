"""What the measures say: Kendall's τ with held-out accuracy, and the table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.papers.measures_figures import draw
from benchmarks.results import append_jsonl, read_jsonl

if TYPE_CHECKING:
    from benchmarks.papers.measures import Series

DIRECTIONS = {"heuristic": {"mean_h": 1, "mean_mi": -1}, "example-level": {"mean_h": -1, "mean_mi": 1}}
MEASURES = ("mean_h", "median_h", "mean_mi", "median_mi", "mean_binned_mi", "mean_quantile_mi")


def report(out: Path, every: Sequence[Series]) -> None:
    """Write ``papers.jsonl``, ``papers_measures.md`` and the figures from ``runs.jsonl``."""
    runs = read_jsonl(out / "runs.jsonl")
    summary = [row for series in every for row in findings(series, runs)]
    epochs = [r for r in runs if r["experiment"] == "waterbirds_epochs"]
    if epochs:
        summary += epoch_findings(epochs)
    if not summary:
        return
    path = out / "papers.jsonl"
    names = {row["experiment"] for row in summary}
    others = [row for row in read_jsonl(path) if row.get("experiment") not in names]
    path.unlink(missing_ok=True)
    for row in [*others, *summary]:
        append_jsonl(path, row)
    text = table(summary)
    (out / "papers_measures.md").write_text(text)
    print(text)
    draw(out, runs, every)


def findings(series: Series, runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Per measure: τ with the accuracy off the training distribution, over the levels of one series."""
    mine = [r for r in runs if r["experiment"] == series.name]
    by_level = {level: [r for r in mine if r["level"] == level] for level in series.levels}
    if not all(by_level.values()):
        return

    def mean(name: str, rows: list[dict[str, Any]]) -> float:
        return sum(r[name] for r in rows) / len(rows)

    extrinsic = [mean("extrinsic", rows) for rows in by_level.values()]
    for measure in MEASURES:
        sign = DIRECTIONS[series.kind]["mean_h" if measure.endswith("_h") else "mean_mi"]
        seeds = sorted({r["seed"] for r in mine})
        single = []
        for seed in seeds:
            rows = [r for r in mine if r["seed"] == seed]
            if len(rows) == len(series.levels):
                single.append(tau([sign * r[measure] for r in rows], [r["extrinsic"] for r in rows]))
        values = [mean(measure, rows) for rows in by_level.values()]
        yield {
            "experiment": series.name,
            "measure": measure,
            "kendall_tau": tau([sign * v for v in values], extrinsic),
            "paper_tau": series.paper_tau.get(measure),
            "seeds": len(seeds),
            "tau_by_seed": single,
            "levels": list(by_level),
            "values": values,
            "extrinsic": extrinsic,
            "expected": f"{series.kind}: {'+' if sign > 0 else '-'} with held-out accuracy",
        }


def epoch_findings(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Per run: τ of each measure with the memorization gap, and the test accuracy of the epoch that it picks."""
    names = [n for n in runs[0]["epochs"][0] if n.startswith("diversity/")]
    for name in names:
        taus, gains, picks = [], {"min": [], "max": []}, {"min": [], "max": []}
        for r in runs:
            epochs = r["epochs"]
            values = [e[name] for e in epochs]
            gap = [e["train_group_acc"] for e in epochs]
            gaps = [min(train) - min(e["test_group_acc"]) for train, e in zip(gap, epochs, strict=True)]
            taus.append(tau(values, gaps))
            last = min(epochs[-1]["test_group_acc"])
            for way, best in (("min", min), ("max", max)):
                at = values.index(best(values))
                picks[way].append(at + 1)
                gains[way].append(min(epochs[at]["test_group_acc"]) - last)
        yield {
            "experiment": "waterbirds_epochs",
            "measure": name,
            "kendall_tau": None if None in taus else sum(taus) / len(taus),
            "paper_tau": None,
            "seeds": len(runs),
            "tau_by_seed": taus,
            **{f"pick_{way}_epochs": picks[way] for way in picks},
            **{f"pick_{way}_worst_group_gain": sum(g) / len(g) for way, g in gains.items()},
        }


def tau(values: list[float], other: list[float]) -> float | None:
    """Kendall's τ-b; ``None`` where one side is constant."""
    from scipy.stats import kendalltau

    value = float(kendalltau(values, other).statistic)
    return None if math.isnan(value) else value


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def table(summary: list[dict[str, Any]]) -> str:
    lines = [
        "τ is positive where the measure moves as the paper says: with heuristic memorization (less held-out accuracy)",
        "entropy falls and mutual information rises, with example-level memorization the reverse.",
        "",
        "| experiment | measure | τ of the means | τ by seed | paper's τ | seeds | values by level |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        by_seed = " ".join(map(number, row["tau_by_seed"]))
        paper = number(row["paper_tau"])
        values = " ".join(f"{v:.3f}" for v in row.get("values", []))
        if "pick_min_worst_group_gain" in row:
            gains = (row["pick_min_worst_group_gain"], row["pick_max_worst_group_gain"])
            values = "worst group against the last epoch: smallest {:+.3f}, largest {:+.3f}".format(*gains)
        lines.append(
            f"| {row['experiment']} | {row['measure']} | {number(row['kendall_tau'])} | {by_seed} "
            f"| {paper} | {row['seeds']} | {values} |"
        )
    return "\n".join(lines) + "\n"
