"""The figures of a report, as matplotlib figures and as SVG that takes the colours of the page around it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

from demem.report.facts import ExampleFacts, ReportData, UnitFacts
from demem.tracing import label_quadrants

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins, each replaced by a CSS variable in the page; on their own they are readable on white.
COLOURS = {
    "#1a1c20": "var(--ink)",
    "#6b7079": "var(--soft)",
    "#c9ccd1": "var(--line)",
    "#2f6fb4": "var(--blue)",
    "#c2571a": "var(--orange)",
}
INK, SOFT, LINE, BLUE, ORANGE = COLOURS


def unit_map(units: Sequence[UnitFacts]) -> Figure:
    """Draw each unit's mean impact on atypical against that on typical held-out examples.

    Args:
        units: of one network; those that were masked are drawn as crosses, those shown in detail carry their number.

    Example:
        >>> figure = unit_map([UnitFacts("fc:input", 0, 0.5, -0.2, False, [3])])
        >>> words = [text.get_text() for text in figure.axes[0].texts]
        >>> words[0], words[-1]
        ('helps everybody', '0')
    """
    figure, axes = _figure(6.4, 4.8)
    axes.axhline(0, color=LINE, lw=1, zorder=1)
    axes.axvline(0, color=LINE, lw=1, zorder=1)
    for touched, colour, marker, label in ((False, BLUE, "o", "kept"), (True, ORANGE, "X", "masked")):
        these = [u for u in units if u.touched is touched]
        if these:
            x, y = [u.on_typical for u in these], [u.on_atypical for u in these]
            size = 16 if len(units) > 300 else 30
            axes.scatter(
                x, y, s=size, c=colour, marker=marker, alpha=0.75, lw=0, zorder=2, label=f"{label}: {len(these)}"
            )
    axes.margins(0.14)
    label_quadrants(axes, SOFT)
    _number(axes, [u for u in units if u.drivers])
    axes.set_xlabel("mean impact on typical examples, logits (positive: helps)")
    axes.set_ylabel("mean impact on atypical examples, logits")
    if any(u.touched for u in units):
        axes.legend(loc="upper center", ncols=2, frameon=False, bbox_to_anchor=(0.5, 1.1), labelcolor=INK)
    return figure


def _number(axes: Axes, units: Sequence[UnitFacts]) -> None:
    """Write each unit's number beside its point, where it covers no other number."""
    taken: list[tuple[float, float]] = []
    for unit in units:
        x, y = axes.transData.transform((unit.on_typical, unit.on_atypical)) * 72 / axes.figure.dpi
        width = 6.5 * len(str(unit.unit))
        places = [(4.0, 3.0), (4.0, -10.0), (-4 - width, 3.0), (-4 - width, -10.0), (4.0, 15.0), (4.0, -22.0)]
        free = [
            (dx, dy)
            for dx, dy in places
            if all(abs(x + dx - left) > 22 or abs(y + dy - low) > 11 for left, low in taken)
        ]
        dx, dy = (free or places)[0]
        taken.append((x + dx, y + dy))
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "color": INK, "zorder": 3}
        axes.annotate(str(unit.unit), (unit.on_typical, unit.on_atypical), xytext=(dx, dy), **style)


def diversity_curves(history: Sequence[dict[str, float]]) -> Figure | None:
    """Draw mean entropy and mutual information over the epochs; ``None`` for fewer than two measurements.

    Args:
        history: of an ``ActivationDiversityMonitor``.

    Example:
        >>> rows = [{"epoch": e, "diversity/entropy": 2.0 + e, "diversity/mi": 0.1} for e in range(3)]
        >>> len(diversity_curves(rows).axes)
        2
    """
    if len(history) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    named = [
        ("diversity/entropy", "mean entropy, nats", BLUE),
        ("diversity/mi", "mean mutual information, nats", ORANGE),
    ]
    shown = [line for line in named if any(row.get(line[0]) is not None for row in history)]
    if not shown:
        return None
    figure = Figure(figsize=(3.4 * len(shown), 2.7), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (key, title, colour) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), i + 1)
        _style(axes)
        points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        axes.plot(*zip(*points, strict=True), color=colour, lw=2, marker="o", markersize=3.5)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def example_sheet(data: ReportData, kind: str) -> Figure | None:
    """Draw the examples of a kind with label and prediction in one sheet, for a logger; ``None`` if there are none.

    Args:
        data: of a run.
        kind: ``"typical"``, ``"atypical"`` or ``"memorised"``.

    Example:
        >>> example = ExampleFacts("memorised", "train", 7, 0, 0, True, 1, None, 3.2, text="a fine film")
        >>> figure = example_sheet(ReportData("Net", "today", None, examples=[example]), "memorised")
        >>> figure.axes[0].texts[0].get_text()
        'train 7 · class 0, predicted class 0 · 3.2\\na fine film'
    """
    these = [e for e in data.examples if e.kind == kind]
    if not these:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    pictures = [e for e in these if e.picture is not None]
    columns = min(4, len(pictures)) if pictures else 1
    lines = -(-len(these) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.6 * lines) if pictures else (8, 0.7 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for i, example in enumerate(these):
        axes = figure.add_subplot(lines, columns, i + 1)
        axes.axis("off")
        words = _caption(data, example)
        if example.picture is not None:
            axes.imshow(imread(BytesIO(base64.b64decode(example.picture.partition(",")[2]))))
            axes.set_title(words.replace(" · ", "\n"), fontsize=7)
        else:
            content = example.text or ", ".join(f"{k}: {v}" for k, v in (example.row or {}).items())
            axes.text(0, 0.5, f"{words}\n{content[:160]}", fontsize=8, va="center", parse_math=False)
    return figure


def svg(figure: Figure, name: str, words: str) -> str:
    """The figure as inline SVG: text as text, colours as CSS variables, ids that no other figure has.

    Args:
        figure: drawn in the colours of this module.
        name: prefix of the ids.
        words: what the figure shows, for those who do not see it.

    Example:
        >>> drawn = svg(unit_map([UnitFacts("fc:input", 0, 0.5, -0.2, False)]), "map", "Units")
        >>> drawn.startswith('<svg role="img" aria-label="Units"'), "var(--blue)" in drawn, "#2f6fb4" in drawn
        (True, True, False)
    """
    import matplotlib as mpl

    file = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, variable)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([^;\"]*?)'[^\"]*?(sans-serif)?(?=[;\"])", r"font: \g<1>sans-serif", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"', r"\1\2", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    label = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _caption(data: ReportData, example: ExampleFacts) -> str:
    said = f"{data.class_name(example.y)}, predicted {data.class_name(example.predicted)}"
    return f"{example.split.replace('_', ' ')} {example.position} · {said} · {example.score:.1f}"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def _style(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=SOFT, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
