"""``index.html`` of a comparison: one page without a network that says what to look at."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.figures import KINDS, Cell, Kind, draw_panel
from benchmarks.names import HELD_OUT, HELD_OUT_MEANINGS, TIERS, data_name, method_name
from benchmarks.rows import Arm, Row, arms, paired, panels, seeds_in_words, spread

TEMPLATE = Path(__file__).parent / "templates" / "index.html"
ENOUGH = 5  # seeds of a comparison that holds


def write_page(path: Path, rows: dict[str, list[Row]], columns: tuple[str, ...], legend: str) -> Path:
    """Write the page.

    Args:
        path: of the file.
        rows: by source, see :class:`benchmarks.figures.Kind`.
        columns: heads of the tables; see :func:`benchmarks.report.summarise`.
        legend: what the tables' columns are.
    """
    from jinja2 import Environment, StrictUndefined

    from benchmarks.report import summarise
    from demem.report import write_whole

    results = rows["results"]
    data = list(dict.fromkeys(row["data"] for row in results))
    sources = [s for s in HELD_OUT if s in {row["held_out"] for row in results}]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    tables = {
        name: [
            (HELD_OUT[held_out], seeds_in_words(these), [(line[0], _cells(line)) for line in summarise(these)])
            for (owner, held_out), these in panels(results).items()
            if owner == name
        ]
        for name in data
    }
    text = template.render(
        data=[(name, data_name(name), _figures(name, rows), tables[name]) for name in data],
        short=[short(these) for these in panels(results).values()],
        several=len(data) > 1,
        tiers=[(tier, TIERS[tier]) for tier in sorted({row["tier"] for row in results})],
        sources=[(name, HELD_OUT[name], HELD_OUT_MEANINGS[name]) for name in sources],
        columns=columns,
        legend=legend,
        rows=len(results),
        seeds=seeds_in_words(results) if len(panels(results)) == 1 else None,
        absent=[
            kind.absent for kind in KINDS if rows[kind.source] and kind.absent and not kind.cells(rows[kind.source])
        ],
    )
    return write_whole(path, text)


def short(rows: list[Row]) -> dict[str, Any]:
    """What a panel comes to: ERM, ours against it, and the best others with no and with some group labels.

    Args:
        rows: of one data set and held-out source.

    Returns:
        ``title``, ``data``, ``words`` (a verdict), ``kind`` (``"gain"``, ``"loss"``, ``"open"``) and the accuracies
        ``erm``, ``ours``, ``best`` and ``best_labelled``, each a name and a number or ``None``.
    """
    found, (data, held_out) = arms(rows), (rows[0]["data"], rows[0]["held_out"])
    erm, ours = found.get(("erm", "T0")), found.get(("demem", "T0"))
    kind, words = _verdict(ours, erm)
    return {
        "data": data,
        "title": data_name(data),
        "held_out": HELD_OUT[held_out],
        "kind": kind,
        "words": words,
        "erm": None if erm is None else _accuracy(erm),
        "ours": None if ours is None else _accuracy(ours),
        "best": _best(found, labelled=False),
        "best_labelled": _best(found, labelled=True),
        "seeds": seeds_in_words(rows),
    }


def _verdict(ours: list[Row] | None, erm: list[Row] | None) -> tuple[str, str]:
    if ours is None or erm is None:
        return "open", f"There are no rows of {'demem' if ours is None else 'ERM'} without group labels."
    compared = paired(ours, erm)
    if compared is None:
        return "open", "demem and ERM share no seed."
    difference, half, _ = (100 * value for value in compared)
    average = 100 * (mean(r["avg_acc"] for r in ours) - mean(r["avg_acc"] for r in erm))
    said = f"worst group {difference:+.1f} points, average {average:+.1f}"
    if len(ours) < ENOUGH:
        seeds = f"{len(ours)} seed{'s' * (len(ours) != 1)}"
        return "open", f"{said}; {seeds} only, which does not hold yet"
    if math.isnan(half):
        return "open", f"{said}; no difference between any two seeds"
    said += f" (95% interval of the worst group's {difference - half:+.1f} to {difference + half:+.1f})"
    if difference - half > 0:
        return "gain", f"better than ERM: {said}"
    if difference + half < 0:
        return "loss", f"worse than ERM: {said}"
    return "open", f"no clear difference from ERM: {said}"


def _best(found: dict[Arm, list[Row]], labelled: bool) -> tuple[str, str] | None:
    """The best arm that is not ours, by mean worst group; with some group labels, or with none."""
    others = {a: r for a, r in found.items() if (a[1] != "T0") is labelled and a[0] != "erm" and "demem" not in a[0]}
    if not others:
        return None
    best = max(others, key=lambda a: mean(r["worst_group_acc"] for r in others[a]))
    return method_name(best[0]) + f" {best[1]}" * labelled, _accuracy(others[best])


def _accuracy(rows: list[Row]) -> str:
    return spread([row["worst_group_acc"] for row in rows])


def _figures(data: str, rows: dict[str, list[Row]]) -> list[tuple[Kind, list[tuple[str, str]]]]:
    """Each kind of figure that the data set's rows allow, with its panels' titles and SVG."""
    from demem.report import svg

    found = []
    for number, kind in enumerate(KINDS):
        cells = [cell for cell in kind.cells(rows[kind.source]) if cell.data == data]
        drawn = [
            (_title(cell), svg(draw_panel(kind, cell), f"{data}-{number}-{i}", f"{kind.heading}: {cell.title}"))
            for i, cell in enumerate(cells)
        ]
        if drawn:
            found.append((kind, drawn))
    return found


def _title(cell: Cell) -> str:
    return cell.title.partition(" · ")[2].replace("\n", ", ")


def _cells(line: list[str]) -> list[tuple[str, str]]:
    """Each cell's text, and what it sorts by."""
    return [(method_name(line[0]), method_name(line[0]).lower()), *((text, _number(text)) for text in line[1:])]


def _number(text: str) -> str:
    """The number that a cell begins with; else the text."""
    first = text.replace("<", "0").split(" ")[0]
    try:
        return str(float(first))
    except ValueError:
        return text
