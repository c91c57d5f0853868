"""Table and figures from the rows on disk."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.results import HELD_OUT, read_jsonl

Row = dict[str, Any]
Arm = tuple[str, str]  # method, tier
Panel = tuple[str, str]  # data set, held-out source: what arms are compared within

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

LEGEND = """\
Test accuracy in percent, mean ± standard deviation over n seeds. *− ERM*: mean difference in worst-group accuracy on
the same seeds and held-out source, with its 95% interval; *p*: paired t-test. *train worst*: worst-group accuracy on
the training set. *s*: seconds per row, training included. Tiers, by the group labels seen: T0 none, T1 validation
groups for selection, T2 validation groups inside the method, T3 training groups. Held-out sources, by what a method may
train on beside the training set: none nothing (the network is judged as trained; held-out labels may select), iid a
random slice of the training set, val the validation set.
"""


def write_report(out: Path, console: Console | None = None, results: Path | None = None) -> None:
    """Print the tables; write ``table.md`` and the figures that the rows allow.  Each held-out source has its own table
    and its own panel, as a rank among arms that train on different data says little.

    Args:
        out: where table and figures go.
        console: where to print; ``None`` prints nothing.
        results: the rows; default ``results.jsonl`` in ``out``.  Some figures also need ``diversity.jsonl``,
            ``units.jsonl`` and ``rounds.jsonl`` beside it.  All may be compressed (``.jsonl.gz``).
    """
    results = results or out / "results.jsonl"
    rows = latest(read_jsonl(results))
    markdown = ["# Worst-group accuracy\n"]
    for (data, held_out), these in _panels_of(rows).items():
        lines = summarise(these)
        epochs = sorted({row["epochs"] for row in these})
        if console is not None:
            console.print(_console_table(_title(data, held_out), epochs, lines, console.width))
        markdown += [
            f"## {_title(data, held_out)}\n",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    markdown.append(LEGEND)
    (out / "table.md").write_text("\n".join(markdown), encoding="utf-8")
    figures = draw_figures(out, rows, results.parent)
    if console is not None:
        console.print(f"Rows, table and {len(figures)} figures are in {out}/.", highlight=False)
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


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each arm, data set and seed; of several numbers of epochs on disk the last one written."""
    epochs = {row["data"]: row["epochs"] for row in rows}
    kept = {(*arm(row), *_panel(row), row["seed"]): row for row in rows if row["epochs"] == epochs[row["data"]]}
    return list(kept.values())


def arm(row: Row) -> Arm:
    return row["method"], row["tier"]


def arms(rows: list[Row]) -> dict[Arm, list[Row]]:
    """The rows of each arm, of one data set and held-out source."""
    found: dict[Arm, list[Row]] = defaultdict(list)
    for row in rows:
        found[arm(row)].append(row)
    return dict(found)


def paired(rows: list[Row], reference: list[Row]) -> tuple[float, float, float] | None:
    """Mean difference in worst-group accuracy on shared seeds, half its 95% interval, and the p of a paired t-test."""
    from scipy import stats

    base = {row["seed"]: row["worst_group_acc"] for row in reference}
    differences = [row["worst_group_acc"] - base[row["seed"]] for row in rows if row["seed"] in base]
    if not differences:
        return None
    half, p = math.nan, math.nan
    if len(differences) > 1 and stdev(differences) > 0:
        half = float(stats.t.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return mean(differences), half, p


def summarise(rows: list[Row]) -> list[list[str]]:
    """One line of text cells per arm of one data set and held-out source, by tier and worst-group accuracy."""
    found = arms(rows)
    lines = []
    order = sorted(found, key=lambda a: (a[1], mean(r["worst_group_acc"] for r in found[a])))
    for name in order:
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
    data, held_out = _panel(rows[-1])
    found = arms([row for row in rows if _panel(row) == (data, held_out)])
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


def draw_figures(out: Path, rows: list[Row], folder: Path | None = None) -> list[Path]:
    """Every figure whose rows are there, as PNG files in ``out``; those of single runs are read from ``folder``."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    figures = [
        _worst_group(out, rows),
        _worst_against_average(out, rows),
        _gap(out, rows),
        _diversity(out, _read_extra(folder or out, "diversity")),
        _units(out, _read_extra(folder or out, "units")),
        _rounds(out, _read_extra(folder or out, "rounds")),
    ]
    return [figure for figure in figures if figure is not None]


def _read_extra(folder: Path, kind: str) -> list[Row]:
    return read_jsonl(folder / f"{kind}.jsonl") or read_jsonl(folder / f"{kind}.jsonl.gz")


def spread(values: list[float]) -> str:
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _interval(values: list[float]) -> float:
    """Half the 95% interval of the mean (t)."""
    from scipy import stats

    if len(values) < 2:
        return 0.0
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def _panels(count: int, width: float = 5.0, height: float = 3.6, columns: int | None = None) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    columns = columns or min(count, 4)
    rows = -(-count // columns)
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, list(axes.flat[:count])


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _name(name: Arm) -> str:
    return f"{name[0]} {name[1]}"


def _panel(row: Row) -> Panel:
    return row["data"], row["held_out"]


def _title(data: str, held_out: str) -> str:
    return f"{data}, held out: {held_out}"


def _panels_of(rows: list[Row]) -> dict[Panel, list[Row]]:
    """The rows by data set, as they come, and held-out source, from the least to the most held-out data."""
    data = list(dict.fromkeys(row["data"] for row in rows))
    found: dict[Panel, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (data.index(row["data"]), HELD_OUT.index(row["held_out"]))):
        found[_panel(row)].append(row)
    return dict(found)


def _grid(panels: dict[Panel, list[Row]], **size: float) -> tuple[Any, list[tuple[Any, Panel, list[Row]]]]:
    """A figure and (axis, panel, its rows): with several held-out sources a column for each, and a row for each data
    set."""
    data, sources = list(dict.fromkeys(d for d, _ in panels)), [s for s in HELD_OUT if s in {s for _, s in panels}]
    several = len(sources) > 1
    shown = [(d, s) for d in data for s in sources] if several else list(panels)
    figure, axes = _panels(len(shown), columns=len(sources) if several else None, **size)
    for axis, panel in zip(axes, shown, strict=True):
        if panel not in panels:
            axis.remove()
    return figure, [(axis, p, panels[p]) for axis, p in zip(axes, shown, strict=True) if p in panels]


def _worst_group(out: Path, rows: list[Row]) -> Path | None:
    panels = _panels_of(rows)
    if not panels:
        return None
    tallest = max(len(arms(these)) for these in panels.values())
    figure, cells = _grid(panels, width=6.5, height=1.2 + 0.32 * tallest)
    for axis, panel, these in cells:
        found = arms(these)
        order = sorted(found, key=lambda a: mean(r["worst_group_acc"] for r in found[a]))
        values = [[100 * r["worst_group_acc"] for r in found[a]] for a in order]
        colors = ["C1" if a[0] == "demem" else "C7" if a[0] == "erm" else "C0" for a in order]
        axis.barh(range(len(order)), [mean(v) for v in values], xerr=[_interval(v) for v in values], color=colors)
        for y, value in enumerate(values):
            axis.plot(value, [y] * len(value), "k.", markersize=3)
        axis.set_yticks(range(len(order)), [_name(a) for a in order])
        axis.set(title=_title(*panel), xlabel="worst-group accuracy, % (95% interval)", xlim=(0, 100))
    return _save(figure, out / "worst_group.png")


def _worst_against_average(out: Path, rows: list[Row]) -> Path | None:
    panels = _panels_of(rows)
    if not panels:
        return None
    figure, cells = _grid(panels)
    for axis, panel, these in cells:
        found = arms(these)
        for a, group in found.items():
            x = [100 * r["adjusted_avg_acc"] for r in group]
            y = [100 * r["worst_group_acc"] for r in group]
            style = {"marker": "*", "markersize": 11} if a[0] == "demem" else {"marker": "o"}
            axis.errorbar(mean(x), mean(y), _interval(y), _interval(x), capsize=2, label=_name(a), **style)
        axis.set(title=_title(*panel), xlabel="adjusted average accuracy, %", ylabel="worst-group accuracy, %")
        axis.legend(fontsize=6)
    return _save(figure, out / "worst_against_average.png")


def _gap(out: Path, rows: list[Row]) -> Path | None:
    """Memorization gap: training minus test accuracy of the group that is worst on the test set of ERM."""
    panels = {panel: these for panel, these in _panels_of(rows).items() if any(r["method"] == "erm" for r in these)}
    if not panels:
        return None
    tallest = max(len(arms(these)) for these in panels.values())
    figure, cells = _grid(panels, width=6.5, height=1.2 + 0.32 * tallest)
    for axis, panel, these in cells:
        found = arms(these)
        erm = next(group for a, group in found.items() if a[0] == "erm")
        groups = range(len(erm[0]["group_acc"]))
        worst = min(groups, key=lambda g: mean(r["group_acc"][g] if r["group_acc"][g] is not None else 1 for r in erm))
        gaps = {a: _group_gap(group, worst) for a, group in found.items()}
        order = sorted(gaps, key=lambda a: -gaps[a])
        axis.barh(range(len(order)), [gaps[a] for a in order], color=["C1" if a[0] == "demem" else "C0" for a in order])
        axis.set_yticks(range(len(order)), [_name(a) for a in order])
        axis.set(title=f"{_title(*panel)}, group {worst}", xlabel="training − test accuracy, points")
    return _save(figure, out / "memorization_gap.png")


def _group_gap(rows: list[Row], group: int) -> float:
    return mean(100 * ((r["train_group_acc"][group] or 0) - (r["group_acc"][group] or 0)) for r in rows)


def _diversity(out: Path, rows: list[Row]) -> Path | None:
    """Entropy and mutual information over the epochs, first seed of each arm."""
    rows = [row for row in rows if row["seed"] == min(r["seed"] for r in rows)]
    if not rows:
        return None
    panels = _panels_of(rows)
    figure, axes = _panels(2 * len(panels), width=4.0)
    for i, (panel, these) in enumerate(panels.items()):
        for axis, key, label in (
            (axes[2 * i], "entropy", "mean entropy, nats"),
            (axes[2 * i + 1], "mutual_information", "mean mutual information, nats"),
        ):
            for a in dict.fromkeys(arm(row) for row in these):
                points = sorted((r["epoch"], r[key]) for r in these if arm(r) == a and r.get(key) is not None)
                axis.plot(*zip(*points, strict=True), label=_name(a)) if points else None
            axis.set(title=_title(*panel), xlabel="epoch", ylabel=label)
            if axis.has_data():
                axis.legend(fontsize=6)
    return _save(figure, out / "diversity.png")


def _units(out: Path, rows: list[Row]) -> Path | None:
    """The unit map: mean impact of each unit on typical against atypical held-out examples, before and after."""
    panels = _first_seeds(rows)
    if not panels:
        return None
    views = [(name, these, after) for name, these in panels.items() for after in ("", "_after")]
    figure, axes = _panels(len(views), width=4.2)
    for axis, (name, these, after) in zip(axes, views, strict=True):
        for gated, color, label in ((False, "C0", "kept"), (True, "C3", "gated")):
            points = [(r[f"typical{after}"], r[f"atypical{after}"]) for r in these if bool(r.get("gated")) is gated]
            if points:
                axis.scatter(*zip(*points, strict=True), s=6, c=color, alpha=0.6, label=label)
        axis.axhline(0, color="0.7", lw=0.6)
        axis.axvline(0, color="0.7", lw=0.6)
        axis.set(
            title=f"{name}, {'after' if after else 'before'}",
            xlabel="impact on typical examples (logits)",
            ylabel="impact on atypical examples (logits)",
        )
        axis.legend(fontsize=6)
    return _save(figure, out / "unit_map.png")


def _rounds(out: Path, rows: list[Row]) -> Path | None:
    """Worst group against the share of units that is masked: on held-out examples, which choose, and on test."""
    panels = _first_seeds(rows)
    if not panels:
        return None
    figure, axes = _panels(len(panels), width=4.2)
    for axis, (name, these) in zip(axes, panels.items(), strict=True):
        points = sorted(
            (100 * r["share"], 100 * r["worst"], 100 * r["test_worst"], bool(r["chosen"]))
            for r in these
            if r["refitted"]
        )
        shares, held_out, test, chosen = zip(*points, strict=True)
        axis.plot(shares, held_out, "o-", markersize=4, color="C1", label="held-out, groups as inferred or given")
        axis.plot(shares, test, "s--", markersize=4, color="C0", label="test, true groups")
        if True in chosen:  # else the network was left as trained
            at = chosen.index(True)
            axis.plot(shares[at], held_out[at], "k*", markersize=12, label="chosen")
        axis.set(title=name, xlabel="units masked, %", ylabel="worst group, %")
        axis.legend(fontsize=6)
    return _save(figure, out / "rounds.png")


def _first_seeds(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each arm's first seed, by the arm's title."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        key = f"{row['data']}: {row['method']} {row['tier']}, {row['held_out']}"
        if not panels.get(key) or panels[key][0]["seed"] == row["seed"]:
            panels.setdefault(key, []).append(row)
    return panels
