"""Render the data of a report as one HTML file that needs nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from demem.report.facts import ExampleFacts, GroupFacts, ReportData, UnitFacts
from demem.report.figures import diversity_curves, svg, unit_map
from demem.report.words import (
    COSTLY,
    SCORES,
    actions,
    average,
    contradiction,
    evidence,
    gap,
    group_word,
    outcome,
    verdict_words,
    worst,
)

if TYPE_CHECKING:
    from jinja2 import Template

FEW = 20  # held-out examples of a group; an accuracy on fewer is uncertain by ten points and more
SHOWN_GROUPS, SHOWN_LAYERS = 16, 10

_KINDS = {
    "typical": (
        "Typical",
        "Unseen examples that are like most of their class. The network gets them right by whatever means.",
    ),
    "atypical": (
        "Atypical",
        "Unseen examples on which the shortcut fails, the worst first. What is wrong here shows what the network "
        "leans on.",
    ),
    "memorised": (
        "Memorised",
        "Training examples that the network gets right against its shortcut units: known by heart, or wrongly "
        "labelled.",
    ),
}


class Tile(NamedTuple):
    """One of the figures at the top: ``before`` → ``after``, or ``after`` alone."""

    label: str
    before: str
    after: str
    note: str
    bad: bool = False


def render(data: ReportData) -> str:
    """The report as a page of HTML: figures and pictures inline, light and dark, no network.

    Args:
        data: what is known of the run.

    Example:
        >>> page = render(ReportData("Net", "1 May 2026", None, title="Birds & boats"))
        >>> "<h1>Birds &amp; boats</h1>" in page, "http" in page.replace("http://www.w3.org", "")
        (True, False)
    """
    words = verdict_words(data.verdict)
    drivers = {e.position: e for e in data.examples if e.split == "held_out"}
    curves = diversity_curves(data.diversity)
    return _template().render(
        data=data,
        words=words,
        why=[] if data.verdict is None else evidence(data.verdict),
        contradiction=contradiction(data),
        tiles=_tiles(data),
        groups=[
            (_truth(truth, data), *_groups(data, truth))
            for truth in (False, True)
            if any(g.truth is truth for g in data.groups)
        ],
        masked=any(unit.touched for unit in data.units),
        kinds=[(key, *_kind(data, key), these) for key in _KINDS if (these := _examples(data, key))],
        map=svg(unit_map(data.units), "map", "The impact of every unit on typical and atypical examples")
        if data.units
        else None,
        units_read=_units_read(data.units),
        top=[
            (unit, _shares(unit), [_card(data, drivers[p]) for p in unit.drivers if p in drivers])
            for unit in _top(data)
        ],
        touched=[t for t in data.touched if t.units],
        outcome=outcome(data),
        layers=_layers(data),
        diversity=None
        if curves is None
        else svg(curves, "diversity", "Entropy and mutual information over the epochs"),
        diversity_read=_diversity_read(data),
        actions=actions(data),
        costs=_costs(data),
        numbers=_numbers(data),
        percent=percent,
        points=_points,
    )


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, a dash for ``None``.

    Example:
        >>> percent(0.256), percent(None)
        ('25.6%', '–')
    """
    return "–" if value is None else f"{100 * value:.{digits}f}%"


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("demem.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}".replace("-", "−")


def _tiles(data: ReportData) -> list[Tile]:
    tiles = []
    inferred = [g for g in data.groups if not g.truth]
    if data.rounds and (data.kept or data.rounds[0]).worst is not None:
        kept = data.kept or data.rounds[0]
        note = "cross-fitted: judged by heads that have not seen the example" if kept.refitted else "held-out data"
        few = _smallest(inferred)
        if few is not None:
            note += f"; of {few} held-out examples, too few to trust"
        before = percent(data.rounds[0].worst) if kept.refitted else ""
        tiles.append(Tile(f"Worst {group_word(data.verdict)}", before, percent(kept.worst), note))
    ends = average(data, after=False), average(data, after=True)
    if ends[0] is not None and ends[1] is not None:
        costly = 100 * (ends[0] - ends[1]) > COSTLY
        before = percent(ends[0]) if data.refitted else ""
        tiles.append(Tile("Average, held out", before, percent(ends[1]), "over all held-out examples", costly))
    first = worst(inferred)
    if first is not None:
        gaps = gap(first, after=False), gap(first, after=True)
        tiles.append(
            Tile(
                "Memorization gap",
                _points(gaps[0]) if data.refitted else "",
                _points(gaps[1]),
                f"points: training minus held-out accuracy of {data.group_name(first)}",
            )
        )
    true = worst([g for g in data.groups if g.truth])
    if true is not None and true.held_out_before is not None:
        after = min((g.held_out_after for g in data.groups if g.truth and g.held_out_after is not None), default=None)
        tiles.append(
            Tile(
                "Worst true group",
                percent(true.held_out_before) if data.refitted else "",
                percent(after if data.refitted else true.held_out_before),
                "the groups in your batches, which the remover did not need",
            )
        )
    if data.fit_seconds:
        share = data.callback_seconds / data.fit_seconds
        tiles.append(
            Tile("Cost", "", _seconds(data.callback_seconds), f"{share:.0%} of the fit's {_seconds(data.fit_seconds)}")
        )
    return tiles


def _smallest(groups: list[GroupFacts]) -> int | None:
    """Held-out examples of the worst group, as trained or after, if they are few."""
    first = worst(groups)
    last = worst([replace(g, held_out_before=g.held_out_after) for g in groups])
    size = min((g.held_out for g in (first, last) if g is not None), default=FEW)
    return size if size < FEW else None


def _truth(truth: bool, data: ReportData) -> str:
    if truth:
        return "True groups, from the batches"
    if data.verdict is not None and data.verdict.known:
        return "Given groups, transferred to the training set"
    if data.verdict is None or not data.verdict.shortcut:
        return "Classes, as no shortcut was found"
    return "Inferred groups: class and what the probe sees"


def _groups(data: ReportData, truth: bool) -> tuple[list[dict[str, Any]], int]:
    """The groups to show, and how many are left out."""
    rows, groups = [], [g for g in data.groups if g.truth is truth]
    if len(groups) > SHOWN_GROUPS:
        measured = [g for g in groups if g.held_out_before is not None]
        worst_ones = sorted(measured, key=lambda g: g.held_out_before or 0.0)[:SHOWN_GROUPS]
        shown = [g for g in groups if g in worst_ones]
    else:
        shown = groups
    for group in shown:
        before, after = group.held_out_before, group.held_out_after
        ends = [v for v in (before, after) if v is not None]
        rows.append(
            {
                "facts": group,
                "name": data.group_name(group),
                "before": before,
                "after": after if data.refitted else None,
                "from": min(ends, default=0.0),
                "to": max(ends, default=0.0),
                "gap": gap(group, after=False),
                "gap_after": gap(group, after=True) if data.refitted else None,
                "few": group.held_out < FEW,
            }
        )
    return rows, len(groups) - len(shown)


def _kind(data: ReportData, key: str) -> tuple[str, str]:
    title, words = _KINDS[key]
    if key == "atypical" and not (data.verdict is not None and (data.verdict.shortcut or data.verdict.known)):
        words = "Unseen examples that the network was least sure of, the worst first."
    return title, words


def _examples(data: ReportData, kind: str) -> list[dict[str, Any]]:
    return [_card(data, example) for example in data.examples if example.kind == kind]


def _card(data: ReportData, example: ExampleFacts) -> dict[str, Any]:
    informative = data.verdict is not None and data.verdict.shortcut
    known = example.right_after is not None and data.refitted
    return {
        "facts": example,
        "label": data.class_name(example.y),
        "predicted": data.class_name(example.predicted),
        "right": example.predicted == example.y,
        "attribute": data.attribute_name(example.attribute) if informative and example.attribute is not None else None,
        "against": informative and example.attribute is not None and example.attribute != example.y,
        "group": None if example.group is None else data.true_group_name(example.group),
        "after": ("right" if example.right_after else "wrong") if known else None,
        "score": f"{example.score:+.1f}".replace("-", "−"),
        "score_words": SCORES.get(example.kind, ""),
        "pixelated": 0 < example.pixels < 64,
    }


def _top(data: ReportData) -> list[UnitFacts]:
    return sorted((u for u in data.units if u.drivers), key=lambda u: u.on_atypical)


def _shares(unit: UnitFacts) -> str:
    typical = "helps" if unit.on_typical > 0 else "costs"
    atypical = "helps" if unit.on_atypical > 0 else "costs"
    return (
        f"{typical} typical examples {abs(unit.on_typical):.2f} logits and {atypical} atypical ones "
        f"{abs(unit.on_atypical):.2f}"
    )


def _units_read(units: list[UnitFacts]) -> str:
    if not units:
        return ""
    shortcut = [u for u in units if u.on_typical > 0 > u.on_atypical]
    harm = -sum(u.on_atypical for u in units if u.on_atypical < 0)
    tenth = sorted((-u.on_atypical for u in units if u.on_atypical < 0), reverse=True)[: max(1, len(units) // 10)]
    if harm <= 0:
        return "No unit that the head reads hurts atypical examples on average."
    share = sum(tenth) / harm
    return (
        f"{len(shortcut)} of the {len(units)} units that the head reads help typical examples and hurt atypical ones. "
        f"The worst tenth of the units does {share:.0%} of the harm."
    )


def _layers(data: ReportData) -> tuple[list[dict[str, Any]], int]:
    """The layers that changed most, in the order of the network, and how many are left out; a head that was refitted
    has new weights, whatever the old ones were."""
    moved = [layer for layer in data.layers if layer.change > 0]
    most = sorted(moved, key=lambda layer: -layer.change)[:SHOWN_LAYERS]
    largest = max((layer.change for layer in data.layers if layer.change < 1), default=1.0) or 1.0
    shown = [
        {
            "name": layer.layer,
            "change": "new" if layer.change >= 1 else f"{layer.change:.2%}",
            "width": round(min(100.0, 100 * layer.change / largest), 1),
        }
        for layer in moved
        if layer in most
    ]
    return shown, len(data.layers) - len(shown)


def _diversity_read(data: ReportData) -> str:
    rows = [r for r in data.diversity if r.get("diversity/entropy") is not None]
    if len(rows) < 2:
        return ""
    entropy = rows[-1]["diversity/entropy"] - rows[0]["diversity/entropy"]
    if rows[0].get("diversity/mi") is None or rows[-1].get("diversity/mi") is None:
        return f"Over the run entropy {_moved(entropy)}."
    mi = rows[-1]["diversity/mi"] - rows[0]["diversity/mi"]
    said = f"Over the run entropy {_moved(entropy)} and mutual information {_moved(mi)}. "
    if entropy < 0 < mi:
        return said + "Units became more alike, which goes with leaning on a shortcut."
    if mi < 0 < entropy:
        return said + (
            "Units became more diverse; that is good as long as held-out accuracy rises with it, and goes with "
            "memorising single examples where it does not."
        )
    return said + "The two moved together, which points to neither kind of memorization by itself."


def _moved(change: float) -> str:
    return f"{'rose' if change > 0 else 'fell'} by {abs(change):.2f} nats"


def _costs(data: ReportData) -> list[tuple[str, str, str]]:
    if not data.fit_seconds:
        return []
    rest = max(0.0, data.fit_seconds - data.callback_seconds - data.report_seconds)
    parts = [
        ("training and validation", rest),
        ("finding groups, masks, refit and fine-tuning", data.callback_seconds),
        ("passes for this report", data.report_seconds),
    ]
    return [(name, _seconds(value), f"{100 * value / data.fit_seconds:.1f}") for name, value in parts]


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value / 60:.0f} min"


def _whose(data: ReportData, group: GroupFacts) -> str:
    """The group's name, and where it comes from unless it is a class."""
    name, origin = data.group_name(group), "true" if group.truth else group_word(data.verdict).partition(" ")[0]
    return name if origin in ("class", "group") or name.startswith(f"{origin} ") else f"{origin}: {name}"


def _numbers(data: ReportData) -> list[tuple[str, str, str, float | None, float | None]]:
    """(what, of whom, measured on, as trained, after); numbers as fractions, logits or seconds."""
    rows: list[tuple[str, str, str, float | None, float | None]] = []
    if data.verdict is not None:
        rows.append(("probe's error", data.verdict.site, "training, cross-fitted", data.verdict.error, None))
        rows.append(("confident of its mistakes", data.verdict.site, "training, cross-fitted", data.verdict.sure, None))
    for g in data.groups:
        whom = _whose(data, g)
        rows += [
            ("examples", whom, "training", float(g.train), None),
            ("examples", whom, "held out", float(g.held_out), None),
            ("accuracy", whom, "training", g.train_before, g.train_after),
            ("accuracy", whom, "held out, cross-fitted", g.held_out_before, g.held_out_after),
            ("accuracy", whom, "held out, labels seen (optimistic)", g.held_out_before, g.held_out_now),
            ("memorization gap", whom, "training − held out", gap(g, False), gap(g, True)),
        ]
    for i, r in enumerate(data.rounds):
        refit = f"{r.share:.0%} masked, weight {r.weight:g}" if not r.ordinary else "all examples alike"
        name = f"round {i}: {refit}" if r.refitted else "as trained"
        rows.append(
            (
                f"worst {group_word(data.verdict)}",
                name + " (kept)" * r.chosen,
                "held out, cross-fitted" if r.refitted else "held out",
                None if r.refitted else r.worst,
                r.worst if r.refitted else None,
            )
        )
    for t in data.touched:
        when = "after training" if t.epoch is None else f"epoch {t.epoch}"
        rows.append(("units touched", t.site, f"{when}: {t.how}", float(t.total), float(t.units)))
    rows += [("weights changed, relative", c.layer, "by the cure", None, c.change) for c in data.layers]
    for row in data.diversity:
        for name, value in row.items():
            if name.startswith("diversity/"):
                rows.append((name.removeprefix("diversity/"), f"epoch {row['epoch']:.0f}", "held out", value, None))
    if data.fit_seconds:
        rows += [
            ("seconds", "whole fit", "wall clock", None, data.fit_seconds),
            ("seconds", "remover", "wall clock", None, data.callback_seconds),
            ("seconds", "this report", "wall clock", None, data.report_seconds),
        ]
    return rows
