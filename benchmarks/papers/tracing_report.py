"""Tables of the tracing experiment, and what they say of the paper's claims, from the rows on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.papers.tracing_figures import draw, lost
from benchmarks.results import read_jsonl

CLAIMED = (0.001, 0.01, 0.03)  # shares of the units that the claims are judged at
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
LEGEND = """\
Accuracy lost, in points, by minority and majority groups (mean over the groups of the kind) when the top units by a
score are changed; mean over seeds with a 95% interval over seeds, not corrected for the number of comparisons. Same
examples before and after (at most 200 a group); *train* and *test* are separate measurements. The first seven scores
are computed on training examples with true groups; `gradient_majority` is the same score for the other groups;
`random` and `matched` (in magnitude to `taylor`, same layers) are the controls, mean of several draws.
"""


def write_report(out: Path) -> None:
    """``tracing.md`` and figures from the rows in ``out``."""
    rows = read_jsonl(out / "tracing.jsonl")
    lines = ["# Units that memorise: what happens when they are changed", "", LEGEND]
    for data in dict.fromkeys(r["data"] for r in rows):
        mine = [r for r in rows if r["data"] == data]
        changes = [r for r in mine if r["part"] == "change"]
        if not changes:
            continue
        seeds = len({r["seed"] for r in changes})
        accuracy = _before(changes)
        lines += [f"## {data} ({seeds} seeds)", "", f"Accuracy before: {accuracy}.", ""]
        for kind in ("zero", "noise", "reinitialise", "rewind"):
            lines += _table(changes, kind)
        lines += _claims(changes, mine)
        lines += _concentration_table([r for r in mine if r["part"] == "concentration"])
        lines += _ranking_table([r for r in mine if r["part"] == "ranking"])
        draw(changes, mine, data, out)
    (out / "tracing.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% interval (Student's t); the half-width is infinite for a single value."""
    n = len(values)
    return mean(values), T_95.get(n, 1.96) * stdev(values) / math.sqrt(n) if n > 1 else math.inf


def _show(values: Sequence[float]) -> str:
    centre, half = interval(values)
    return f"{centre:.1f} ± {half:.1f}" if math.isfinite(half) else f"{centre:.1f}"


def _before(changes: Sequence[dict[str, Any]]) -> str:
    first = {r["seed"]: r for r in changes}.values()
    parts = []
    for split in ("train", "test"):
        groups = zip(*(r[split]["before"] for r in first), strict=True)
        parts.append(f"{split} " + " / ".join(f"{100 * mean(g):.1f}" for g in groups))
    return ", ".join(parts) + f" (groups in order; minority: {next(iter(first))['minority']})"


def _table(changes: Sequence[dict[str, Any]], kind: str) -> list[str]:
    rows = [r for r in changes if r["kind"] == kind]
    if not rows:
        return []
    lines = [
        f"### {kind}",
        "",
        "| score | units | train minority | train majority | test minority | test majority |",
        "|---|---|---|---|---|---|",
    ]
    for score in dict.fromkeys(r["score"] for r in rows):
        for share in sorted({r["share"] for r in rows}):
            group = [r for r in rows if r["score"] == score and r["share"] == share]
            if not group:
                continue
            cells = []
            for split in ("train", "test"):
                few, many = zip(*(lost(r, split) for r in group), strict=True)
                cells += [_show(few), _show(many)]
            lines.append(f"| {score} | {group[0]['k']} ({_percent(share)}) | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _percent(share: float) -> str:
    return f"{100 * share:g}%" if share else "one unit"


def _claims(changes: Sequence[dict[str, Any]], mine: Sequence[dict[str, Any]]) -> list[str]:
    """The paper's claims, judged on paired differences over the seeds: holds, does not hold, or not decided."""
    lines = ["### The paper's claims here", ""]
    fitted = mean(mean(r["train"]["before"][g] for g in r["minority"]) for r in changes)
    if fitted < 0.9:
        lines += [f"Training accuracy of the minority groups is {100 * fitted:.0f}%: little is memorised here.", ""]

    def difference(score: str, split: str, share: float, against: str | None = None) -> list[float]:
        values = {}
        for name in (score, against):
            for r in changes:
                if r["score"] == name and r["kind"] == "zero" and r["share"] == share:
                    few, many = lost(r, split)
                    values[name, r["seed"]] = few - many if against is None else few
        if against is None:
            return [v for (name, _), v in values.items() if name == score]
        both = sorted(s for n, s in values if n == score and (against, s) in values)
        return [values[score, s] - values[against, s] for s in both]

    def judge(text: str, values: Sequence[float]) -> None:
        if len(values) < 2:
            return
        centre, half = interval(values)
        verdict = "holds" if centre > half else "does not hold" if centre < -half else "not decided"
        lines.append(f"- {text}: {centre:+.1f} ± {half:.1f} points, **{verdict}**.")

    for score in ("magnitude", "gradient", "taylor", "taylor_contrast", "two_step"):
        for share in CLAIMED:  # the smallest one where larger ones leave no network standing
            judge(
                f"Zeroing the top {100 * share:g}% by {score} costs minority training examples more than majority ones",
                difference(score, "train", share),
            )
            judge(
                f"… and costs minority training examples more than random units ({100 * share:g}%)",
                difference(score, "train", share, "random"),
            )
    judge(
        "Zeroing the top 1% by taylor costs minority training examples more than units matched in magnitude",
        difference("taylor", "train", 0.01, "matched"),
    )
    judge(
        "… and costs minority TEST examples more than majority ones (1%)",
        difference("taylor", "test", 0.01),
    )
    last = _last_concentration(mine)
    judge(
        "The effect on minority examples is more concentrated (share held by the top 1% of units, in points) than on "
        "majority examples",
        [100 * (few["top_1"] - many["top_1"]) for few, many in last],
    )
    return [*lines, ""]


def _last_concentration(mine: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    rows = [r for r in mine if r["part"] == "concentration"]
    if not rows:
        return []
    last = max(r["epoch"] for r in rows)
    by = {(r["seed"], r["of"]): r for r in rows if r["epoch"] == last}
    return [(by[s, "minority"], by[s, "majority"]) for s, of in by if of == "minority" and (s, "majority") in by]


def _concentration_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "### Concentration",
        "",
        "Share (%) of all units' summed positive first-order effect on the loss that the top units hold.",
        "",
        "| epoch | examples | top 1% | top 5% | top 10% |",
        "|---|---|---|---|---|",
    ]
    for epoch in sorted({r["epoch"] for r in rows}):
        for of in ("minority", "majority"):
            group = [r for r in rows if r["epoch"] == epoch and r["of"] == of]
            if group:
                cells = [_show([100 * r[f"top_{p}"] for r in group]) for p in (1, 5, 10)]
                lines.append(f"| {epoch} | {of} | " + " | ".join(cells) + " |")
    last = max(r["epoch"] for r in rows)
    few = [r for r in rows if r["epoch"] == last and r["of"] == "minority"]
    many = [r for r in rows if r["epoch"] == last and r["of"] == "majority"]
    lines += ["", "By site at the end (% of the effect on minority / majority examples): "]
    sites = {s: (mean(r["by_site"][s] for r in few), mean(r["by_site"][s] for r in many)) for s in few[0]["by_site"]}
    ordered = sorted(sites.items(), key=lambda item: -item[1][0])[:8]
    lines.append(", ".join(f"`{s}` {100 * a:.1f} / {100 * b:.1f}" for s, (a, b) in ordered) + ".")
    return [*lines, ""]


def _ranking_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "### Memorised training examples",
        "",
        "Average precision for the true minority among each class's training examples (no group label used).",
        "",
        "| class | base rate | by loss | by kept − memorising units |",
        "|---|---|---|---|",
    ]
    for c in range(len(rows[0]["base_rate"])):
        base, loss, score = (
            [r[n][c] for r in rows] for n in ("base_rate", "loss_average_precision", "average_precision")
        )
        cells = [f"{mean(base):.3f}"] + [f"{interval(v)[0]:.3f} ± {interval(v)[1]:.3f}" for v in (loss, score)]
        lines.append(f"| {c} | " + " | ".join(cells) + " |")
    return [*lines, ""]
