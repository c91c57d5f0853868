"""The figures of a comparison: what a panel shows, drawn once for the PNG files and once for the page.

One panel has one source of held-out data, as a rank among arms that train on different data says little.  Names lie
inside the panel, beside what they name, so that no legend covers a point; the seeds of an arm lie a little apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.names import HELD_OUT, TIERS, data_name, method_name, short_name
from benchmarks.rows import FEWEST, Arm, Row, arm, arms, by_tier, interval, memorization, panels, seeds_in_words, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that demem.report.svg turns into those of the page around a figure.
INK, SOFT, LINE, BLUE, ORANGE = "#1a1c20", "#6b7079", "#c9ccd1", "#2f6fb4", "#c2571a"
WIDTH, WIDE = 4.1, 5.4  # inches of a panel with a line per arm, and of one with axes both ways
PITCH = 0.36  # inches of an arm's line
LABEL = 0.19  # inches between two labels


class Cell(NamedTuple):
    """One panel: its place, its title and its rows; ``view`` distinguishes panels of the same rows."""

    data: str
    title: str
    rows: list[Row]
    view: str = ""


@dataclass(frozen=True)
class Kind:
    """One kind of figure.

    Attributes:
        name: of the file.
        heading: in the page.
        words: what to look at.
        source: which rows it is made of: ``results``, ``diversity``, ``units`` or ``rounds``.
        cells: its panels.
        height: of a panel, inches.
        width: of a panel, inches.
        draw: one panel.
        absent: what to say where rows are there, and nothing to draw.
    """

    name: str
    heading: str
    words: str
    source: str
    cells: Callable[[list[Row]], list[Cell]]
    height: Callable[[Cell], float]
    draw: Callable[[Axes, Cell], None]
    absent: str = ""
    width: float = WIDE


# Panels


def _compared(rows: list[Row]) -> list[Cell]:
    return [Cell(data, title(data, held_out), these) for (data, held_out), these in panels(rows).items()]


def _against_erm(rows: list[Row]) -> list[Cell]:
    return [cell for cell in _compared(rows) if any(row["method"] == "erm" for row in cell.rows)]


def _measured(rows: list[Row]) -> list[Cell]:
    """Each panel's first seed, once for each measure that there is."""
    found = []
    for cell in _compared(rows):
        first = min(row["seed"] for row in cell.rows)
        these = [row for row in cell.rows if row["seed"] == first]
        for key, name in (("entropy", "entropy"), ("mutual_information", "mutual information")):
            if any(row.get(key) is not None for row in these):
                found.append(Cell(cell.data, f"{cell.title}, mean {name}", these, key))
    return found


def _of_each_arm(rows: list[Row], views: Sequence[str] = ("",)) -> list[Cell]:
    """The rows of each arm's first seed."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = row["data"], row["held_out"], row["method"], row["tier"]
        if not found.get(key) or found[key][0]["seed"] == row["seed"]:
            found.setdefault(key, []).append(row)
    return [
        Cell(data, f"{title(data, held_out)}\n{method_name(method)} {tier}{', ' * bool(view)}{view}", these, view)
        for (data, held_out, method, tier), these in found.items()
        for view in views
    ]


def _touched(row: Row) -> bool:
    return bool(row.get("gated") or row.get("touched"))


def _mapped(rows: list[Row]) -> list[Cell]:
    """Arms that touched units, before and after."""
    return [cell for cell in _of_each_arm(rows, ("before", "after")) if any(map(_touched, cell.rows))]


def _rounds(rows: list[Row]) -> list[Cell]:
    return [cell for cell in _of_each_arm(rows) if any(row["refitted"] for row in cell.rows)]


def title(data: str, held_out: str) -> str:
    """Of a panel: the data set, and what is held out for the methods."""
    return f"{data_name(data)} · {HELD_OUT[held_out]}"


# Lines: one per arm


def _lines(rows: list[Row]) -> int:
    found = arms(rows)
    return len(found) + len(by_tier(found))


def _lines_height(cell: Cell) -> float:
    return PITCH * _lines(cell.rows) + 0.75


def _draw_lines(axis: Axes, cell: Cell, right: Callable[[Arm], str], mark: Callable[[Arm, float], None]) -> None:
    """An arm's name and a number on one line, its marks below, under a heading for each tier."""
    found, line = arms(cell.rows), 0.0
    for tier, these in by_tier(found).items():
        axis.text(0, line + 0.52, f"{tier}: {TIERS[tier]}", fontsize=8, color=SOFT, style="italic", va="center")
        line += 1
        for name in these:
            ours = name[0] == "demem"
            style: dict[str, Any] = {"fontsize": 8, "color": INK, "va": "center"}
            style["fontweight"] = "bold" if ours else "normal"
            axis.text(0, line + 0.28, method_name(name[0]), **style)
            axis.text(100, line + 0.28, right(name), ha="right", **style)
            mark(name, line + 0.74)
            line += 1
    axis.set(xlim=(-1.5, 101.5), ylim=(line + 0.2, -0.1), xticks=(0, 25, 50, 75, 100), yticks=())
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)


def _track(axis: Axes, line: float, left: float, right: float, colour: str) -> None:
    """A bar, and a thin line where it is not."""
    for start, end, width, shade in ((0, left, 0.8, LINE), (left, right, 4, colour), (right, 100, 0.8, LINE)):
        alpha = 0.35 if width == 4 else 1.0
        axis.plot((start, end), (line, line), color=shade, lw=width, alpha=alpha, zorder=1, solid_capstyle="butt")


def _worst_group(axis: Axes, cell: Cell) -> None:
    found = arms(cell.rows)
    erm = found.get(("erm", "T0"))
    seeds = sorted({row["seed"] for row in cell.rows})

    def mark(name: Arm, line: float) -> None:
        values = [100 * row["worst_group_acc"] for row in found[name]]
        middle, colour = mean(values), _colour(name)
        _track(axis, line, 0, middle, colour)
        if len(values) >= FEWEST:
            half = interval(values)
            ends = max(0.0, middle - half), min(100.0, middle + half)
            axis.plot(ends, (line, line), color=colour, lw=1.2, zorder=3)
        if erm is not None:
            reference = 100 * mean(row["worst_group_acc"] for row in erm)
            axis.plot((reference,) * 2, (line - 0.16, line + 0.16), color=INK, lw=0.9, zorder=3)
        apart = [line + 0.22 * (seeds.index(row["seed"]) / max(1, len(seeds) - 1) - 0.5) for row in found[name]]
        axis.scatter(values, apart, s=7, color=colour, lw=0, zorder=4)

    _draw_lines(axis, cell, lambda name: spread([row["worst_group_acc"] for row in found[name]]), mark)
    few = f"{seeds_in_words(cell.rows)}: no interval" if _few(cell) else "line: 95% interval"
    axis.set_xlabel(f"worst-group test accuracy, %\nbar: mean · dot: a seed · {few} · tick: ERM", fontsize=7.5)


def _few(cell: Cell) -> bool:
    return all(len(these) < FEWEST for these in arms(cell.rows).values())


def _gap(axis: Axes, cell: Cell) -> None:
    reference = [row for row in cell.rows if row["method"] == "erm"]
    worst, accuracies = memorization(cell.rows, reference)
    shown = [row for row in cell.rows if arm(row) in accuracies]

    def mark(name: Arm, line: float) -> None:
        train, test = (100 * accuracy for accuracy in accuracies[name])
        colour = _colour(name)
        _track(axis, line, min(test, train), max(test, train), colour)
        axis.scatter([train], [line], s=24, facecolors="none", edgecolors=colour, lw=1.2, zorder=3, clip_on=False)
        axis.scatter([test], [line], s=16, color=colour, lw=0, zorder=4)

    def gap(name: Arm) -> str:
        train, test = accuracies[name]
        return f"{100 * (train - test):.1f}"

    _draw_lines(axis, cell._replace(rows=shown), gap, mark)
    axis.set_xlabel(
        f"accuracy on group {worst}, ERM's worst, %\ndot: test · ring: training · number: gap in points", fontsize=7.5
    )


# Points with labels


def _labelled_height(cell: Cell) -> float:
    return max(3.4, 1.0 + LABEL * len(arms(cell.rows)))


def _worst_against_average(axis: Axes, cell: Cell) -> None:
    found, ends = arms(cell.rows), {}
    for name, these in found.items():
        x, y = ([100 * row[key] for row in these] for key in ("adjusted_avg_acc", "worst_group_acc"))
        ends[name] = _mean_and_bar(x), _mean_and_bar(y)
    xs, ys = ([value for pair in ends.values() for value in pair[i]] for i in (0, 1))
    _room(axis, xs, ys, labels=0.95)
    for name, ((x, left, right), (y, low, high)) in ends.items():
        style: dict[str, Any] = {"color": _colour(name), "lw": 0.9, "alpha": 0.6, "zorder": 2}
        axis.plot((left, right), (y, y), **style)
        axis.plot((x, x), (low, high), **style)
        ours = name[0] == "demem"
        axis.scatter([x], [y], s=70 if ours else 22, marker="*" if ours else "o", color=_colour(name), lw=0, zorder=4)
    labels = [(x, y, f"{short_name(name[0])} {name[1]}", name) for name, ((x, *_), (y, *_)) in ends.items()]
    _label_at_the_right(axis, labels, _labelled_height(cell))
    bars = "" if _few(cell) else "; bars: one standard error"
    axis.set_xlabel(f"adjusted average test accuracy, %{bars}", fontsize=8)
    axis.set_ylabel("worst-group test accuracy, %", fontsize=8)


def _mean_and_bar(values: list[float]) -> tuple[float, float, float]:
    """The mean, and one standard error to either side if there are enough values."""
    middle = mean(values)
    half = stdev(values) / len(values) ** 0.5 if len(values) >= FEWEST else 0.0
    return middle, max(0.0, middle - half), min(100.0, middle + half)


def _diversity(axis: Axes, cell: Cell) -> None:
    labels, xs, ys = [], [], []
    dashes = ("-", "--", ":", "-.")
    others = 0
    for name in arms(cell.rows):
        points = sorted(
            (row["epoch"], row[cell.view]) for row in cell.rows if arm(row) == name and row.get(cell.view) is not None
        )
        if not points:
            continue
        plain = _colour(name) == BLUE
        x, y = zip(*points, strict=True)
        axis.plot(x, y, color=_colour(name), ls=dashes[others % 4] if plain else "-", lw=1.8, marker="o", markersize=3)
        others += plain
        labels.append((x[-1], y[-1], f"{short_name(name[0])} {name[1]}", name))
        xs += x
        ys += y
    _room(axis, xs, ys, labels=0.6)
    _label_at_the_right(axis, labels, 2.6)
    axis.set_xlabel("epoch", fontsize=8)
    axis.set_ylabel("nats", fontsize=8)
    axis.set_xticks([x for x in axis.get_xticks() if x == round(x) and x <= max(xs) and x >= min(xs)])


def _unit_map(axis: Axes, cell: Cell) -> None:
    from demem.tracing import label_quadrants

    after = "_after" * (cell.view == "after")
    for touched, colour, marker in ((False, BLUE, "o"), (True, ORANGE, "X")):
        points = [(row[f"typical{after}"], row[f"atypical{after}"]) for row in cell.rows if _touched(row) is touched]
        if points:
            x, y = zip(*points, strict=True)
            axis.scatter(x, y, s=14, c=colour, marker=marker, alpha=0.7, lw=0, zorder=3)
    axis.axhline(0, color=LINE, lw=0.8, zorder=1)
    axis.axvline(0, color=LINE, lw=0.8, zorder=1)
    axis.margins(0.14)
    label_quadrants(axis, SOFT)
    count = sum(map(_touched, cell.rows))
    axis.set_xlabel(
        f"impact on typical examples, logits (×: the {count} touched of {len(cell.rows)} units)", fontsize=8
    )
    axis.set_ylabel("impact on atypical examples, logits", fontsize=8)


def _masked(axis: Axes, cell: Cell) -> None:
    points = sorted(
        (100 * r["share"], 100 * r["worst"], 100 * r["test_worst"], bool(r["chosen"]))
        for r in cell.rows
        if r["refitted"]
    )
    shares, held_out, test, chosen = zip(*points, strict=True)
    axis.plot(shares, held_out, "o-", markersize=4, color=ORANGE, zorder=3)
    axis.plot(shares, test, "s--", markersize=4, color=BLUE, zorder=3)
    _room(axis, shares, (*held_out, *test), labels=0.75)
    labels = [
        (shares[-1], held_out[-1], "held out, groups as\ninferred or given", ("demem", "")),
        (shares[-1], test[-1], "test, true groups", ("", "")),
    ]
    if True in chosen:  # else the network was left as trained
        at = chosen.index(True)
        axis.scatter(shares[at], held_out[at], s=130, facecolors="none", edgecolors=INK, lw=1.3, zorder=4)
        axis.annotate(
            *("kept", (shares[at], held_out[at])),
            xytext=(0, 10),
            textcoords="offset points",
            fontsize=8,
            color=INK,
            ha="center",
        )
    _label_at_the_right(axis, labels, 1.5)
    axis.set_xlabel("units masked, %", fontsize=8)
    axis.set_ylabel("worst group, %", fontsize=8)


def _room(axis: Axes, xs: Sequence[float], ys: Sequence[float], labels: float) -> None:
    """Limits around the points, and to their right ``labels`` times as much again for their names."""
    wide, high = max(max(xs) - min(xs), 1e-3), max(max(ys) - min(ys), 1e-3)
    axis.set_xlim(min(xs) - 0.06 * wide, max(xs) + (0.06 + labels) * wide)
    axis.set_ylim(min(ys) - 0.08 * high, max(ys) + 0.08 * high)
    step = [tick for tick in axis.get_xticks() if min(xs) - 0.06 * wide <= tick <= max(xs) + 0.06 * wide]
    axis.set_xticks(step)


def _label_at_the_right(axis: Axes, labels: list[tuple[float, float, str, Arm]], height: float) -> None:
    """Write each label on a line of its own in the room at the right, and lead a thin line from its point to it."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    labels = sorted(labels, key=lambda label: (-label[1], label[0]))
    inset, gap = 0.03 * (high - low), LABEL / max(height - 0.8, LABEL) * (high - low)
    lines = spread_apart([label[1] for label in labels], gap, low + inset, high - inset)
    start = max(label[0] for label in labels) + 0.06 * (right - left)
    for (x, y, words, name), line in zip(labels, lines, strict=True):
        axis.plot((x, start), (y, line), color=LINE, lw=0.6, zorder=1)
        bold = "bold" if name[0] == "demem" else "normal"
        axis.text(
            start + 0.01 * (right - left), line, words, fontsize=7.5, color=_colour(name), va="center", fontweight=bold
        )


def spread_apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights that fall by ``gap`` at least, as near to the given falling ones as that allows, within the limits.

    Where there is not enough room the gaps shrink alike.

    >>> spread_apart([5.0, 5.0, 1.0], 1.0, 0.0, 10.0)
    [5.5, 4.5, 1.0]
    """
    count = len(heights)
    gap = min(gap, (high - low) / max(1, count - 1))
    # Pool adjacent violators: with u_i = y_i + i·gap the condition is that u falls weakly.
    blocks: list[list[float]] = []
    for value in (y + i * gap for i, y in enumerate(heights)):
        blocks.append([value])
        while len(blocks) > 1 and mean(blocks[-2]) < mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    pooled = [mean(block) for block in blocks for _ in block]
    moved = [u - i * gap for i, u in enumerate(pooled)]
    for i in range(count):  # from the top down, then from the bottom up
        moved[i] = min(moved[i], high - i * gap)
    for i in range(count):
        moved[i] = max(moved[i], low + (count - 1 - i) * gap)
    return moved


def _colour(name: Arm) -> str:
    return ORANGE if name[0] == "demem" else SOFT if name[0] == "erm" else BLUE


KINDS = [
    Kind(
        "worst_group",
        "Worst-group accuracy",
        "Compare within a tier: its methods have seen the same group labels. The tick on each line is ERM: a bar that "
        "ends to its right helps. Where the dots of the seeds lie far apart a mean says little.",
        "results",
        _compared,
        _lines_height,
        _worst_group,
        width=WIDTH,
    ),
    Kind(
        "worst_against_average",
        "What it costs on average",
        "Up is better for the worst group, right is better on average. A method above and not left of ERM costs "
        "nothing.",
        "results",
        _compared,
        _labelled_height,
        _worst_against_average,
    ),
    Kind(
        "memorization_gap",
        "Memorization gap",
        "Accuracy on the group that is ERM's worst on test data, in the training set (ring) and on test data (dot). A "
        "long bar: the network knows the group's training examples by heart and gets new ones wrong.",
        "results",
        _against_erm,
        _lines_height,
        _gap,
        "There are no rows of ERM, whose worst group the figure is about.",
        WIDTH,
    ),
    Kind(
        "diversity",
        "Diversity of activations",
        "First seed. Low entropy and high mutual information go with leaning on a shortcut; high entropy and low "
        "mutual information with memorising single examples.",
        "diversity",
        _measured,
        lambda cell: 2.6,
        _diversity,
        width=WIDTH,
    ),
    Kind(
        "unit_map",
        "Units that were touched",
        "First seed; only runs in which units were touched. Units at the lower right help typical examples and hurt "
        "atypical ones: those carry the shortcut, and should be the touched ones.",
        "units",
        _mapped,
        lambda cell: 3.9,
        _unit_map,
        "No unit was touched in the recorded runs, so there is no map of units.",
    ),
    Kind(
        "rounds",
        "Masking in rounds",
        "First seed. Held-out data chooses the round, test data is only looked at. A flat line: with this refit of the "
        "head, masks change nothing.",
        "rounds",
        _rounds,
        lambda cell: 3.2,
        _masked,
        "No head was refitted in the recorded runs, so there were no rounds.",
    ),
]


# Files


def draw_grid(kind: Kind, cells: list[Cell]) -> Figure:
    """All panels of a kind: the held-out sources (or arms) of a data set side by side, one line of them per data set;
    data sets with one panel each share lines."""
    by_data: dict[str, list[Cell]] = {}
    for cell in cells:
        by_data.setdefault(cell.data, []).append(cell)
    lines = list(by_data.values())
    if all(len(line) == 1 for line in lines):
        single = [line[0] for line in lines]
        lines = [single[i : i + 3] for i in range(0, len(single), 3)]
    columns = max(len(line) for line in lines)
    heights = [max(kind.height(cell) for cell in line) for line in lines]
    figure = _figure(kind.width * columns, sum(heights))
    grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
    for i, line in enumerate(lines):
        for j, cell in enumerate(line):
            _draw(figure.add_subplot(grid[i, j]), kind, cell)
            if kind.height is _lines_height:
                _same_pitch(figure.axes[-1], max(_lines(c.rows) for c in line))
    return figure


def draw_panel(kind: Kind, cell: Cell) -> Figure:
    """One panel alone, without its title."""
    figure = _figure(kind.width, kind.height(cell))
    _draw(figure.add_subplot(), kind, cell)
    figure.axes[0].set_title("", loc="left")
    return figure


def write_pngs(out: Path, rows: dict[str, list[Row]]) -> list[Path]:
    """Every figure that the rows allow; of those they do not allow an earlier file is removed.

    Args:
        out: folder.
        rows: by source, see :class:`Kind`.
    """
    written = []
    for kind in KINDS:
        path = out / f"{kind.name}.png"
        cells = kind.cells(rows[kind.source])
        if cells:
            draw_grid(kind, cells).savefig(path, dpi=150, facecolor="white")
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return written


def _draw(axis: Axes, kind: Kind, cell: Cell) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(LINE)
    axis.tick_params(colors=SOFT, labelsize=7.5)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
    kind.draw(axis, cell)
    axis.set_title(cell.title, fontsize=9.5, color=INK, loc="left")


def _same_pitch(axis: Axes, lines: int) -> None:
    """Lines as high as in the panel beside it that has the most, and the axis still right below its own."""
    bottom = axis.get_ylim()[0]
    axis.set_ylim(lines + 0.2, -0.1)
    axis.spines["bottom"].set_position(("data", bottom))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
