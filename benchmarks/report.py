"""Tables, figures and a page from the rows on disk."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.results import read_jsonl
from benchmarks.rows import Row, arms, by_tier, latest, paired, panel, panels, spread

COLUMNS = (
    "method",
    "tier",
    "worst group",
    "− ERM",
    "p",
    "avg",
    "adj. avg",
    "train worst",
    "n",
    "s",
)

EXTRAS = ("diversity", "units", "rounds")
"""Rows of single runs that some figures are made of."""

LEGEND = """\
Test accuracy in percent, mean ± standard deviation over n seeds. *− ERM*: mean difference in worst-group accuracy on
the same seeds and held-out source, with its 95% interval; *p*: paired t-test. *train worst*: worst-group accuracy on
the training set. *s*: seconds per row, training included. Tiers, by the group labels seen: T0 none, T1 validation
groups for selection, T2 validation groups inside the method, T3 training groups. Held-out sources, by what a method may
train on beside the training set: none nothing (the network is judged as trained; held-out labels may select), iid a
random slice of the training set, val the validation set.
"""


def write_report(out: Path, console: Console | None = None, results: Path | None = None) -> None:
    """Print the tables; write ``table.md``, the figures that the rows allow and ``index.html``.  Each held-out source
    has its own table and its own panel, as a rank among arms that train on different data says little.

    Args:
        out: where table and figures go.
        console: where to print; ``None`` prints nothing.
        results: the rows; default ``results.jsonl`` in ``out``.  Some figures also need ``diversity.jsonl``,
            ``units.jsonl`` and ``rounds.jsonl`` beside it.  All may be compressed (``.jsonl.gz``).
    """
    results = results or out / "results.jsonl"
    rows = latest(read_jsonl(results))
    markdown = ["# Worst-group accuracy\n"]
    for (data, held_out), these in panels(rows).items():
        lines = summarise(these)
        epochs = sorted({row["epochs"] for row in these})
        if console is not None:
            console.print(_console_table(f"{data}, held out: {held_out}", epochs, lines, console.width))
        markdown += [
            f"## {data}, held out: {held_out}\n",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    markdown.append(LEGEND)
    (out / "table.md").write_text("\n".join(markdown), encoding="utf-8")
    from benchmarks.figures import write_pngs
    from benchmarks.page import write_page

    sources = {"results": rows, **{kind: _read_extra(results.parent, kind) for kind in EXTRAS}}
    figures = write_pngs(out, sources)
    page = write_page(out / "index.html", sources, COLUMNS, LEGEND)
    if console is not None:
        console.print(f"Rows, table and {len(figures)} figures are in {out}/. Open {page}.", highlight=False)
        console.print(next_step(rows), highlight=False, style="bold")


def _console_table(title: str, epochs: list[int], lines: list[list[str]], width: int) -> Table:
    """The columns that fit a terminal of ``width`` characters, which is 80 at least."""
    shown = [0, 1, 2, 3, 4, 6]
    title = f"{title}, {'/'.join(map(str, epochs))} epochs (test accuracy, %)"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    widths = {i: max(len(text) for text in (COLUMNS[i], *(line[i] for line in lines))) for i in shown}
    # Where there is not enough room it is the name that is cut, never a number; two spaces lie between columns and one
    # at each edge.
    room = max(10, width - 2 - sum(widths[i] + 2 for i in shown[1:]))
    for i in shown:
        justify: Literal["left", "right"] = "left" if i < 2 else "right"
        table.add_column(COLUMNS[i], justify=justify, no_wrap=True, width=min(room, widths[i]) if i == 0 else widths[i])
    for line in lines:
        table.add_row(*(line[i] for i in shown))
    return table


def summarise(rows: list[Row]) -> list[list[str]]:
    """One line of text cells per arm of one data set and held-out source, by tier and worst-group accuracy."""
    found = arms(rows)
    lines = []
    for name in (name for these in by_tier(found).values() for name in reversed(these)):
        these = found[name]
        compared = None if name[0] == "erm" else paired(these, found.get(("erm", "T0"), []))
        if compared is None:
            difference, p = "", ""
        else:
            difference = f"{100 * compared[0]:+.1f}" + (
                "" if math.isnan(compared[1]) else f" ± {100 * compared[1]:.1f}"
            )
            p = "" if math.isnan(compared[2]) else f"{compared[2]:.3f}" if compared[2] >= 0.001 else "<.001"
        train = [min(a for a in row["train_group_acc"] if a is not None) for row in these]
        lines.append(
            [
                *name,
                spread([row["worst_group_acc"] for row in these]),
                difference,
                p,
                spread([row["avg_acc"] for row in these]),
                spread([row["adjusted_avg_acc"] for row in these]),
                spread(train),
                str(len(these)),
                f"{mean(row['seconds'] for row in these):.0f}",
            ]
        )
    return lines


def next_step(rows: list[Row]) -> str:
    """One line: what to do next."""
    if not rows:
        return "Next: no rows yet; run python -m benchmarks compare."
    data, held_out = panel(rows[-1])
    found = arms([row for row in rows if panel(row) == (data, held_out)])
    if all(len(these) < 5 for these in found.values()):
        return "Next: five seeds or more for a comparison that holds: --seeds 5 --resume."
    if data == "digits" and not any(row["data"] != "digits" for row in rows):
        return (
            "Next: your own data: Trainer(callbacks=[MemorizationRemover()]), or --data waterbirds --data-root FOLDER."
        )
    ours = {a: these for a, these in found.items() if a[0] == "demem"}
    if ours:
        best = max(ours, key=lambda a: mean(r["worst_group_acc"] for r in ours[a]))
        return f"Next: use the best demem arm ({best[1]}, held out: {held_out}) in your Trainer: see configs/method/."
    return "Next: add the remover to the comparison: --methods erm,demem --resume."


def _read_extra(folder: Path, kind: str) -> list[Row]:
    return read_jsonl(folder / f"{kind}.jsonl") or read_jsonl(folder / f"{kind}.jsonl.gz")
