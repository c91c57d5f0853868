"""Read a run into the data of a report: what the network was before the cure, and what it is after."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from demem.groups import Groups, largest_groups
from demem.linear import LinearHead
from demem.removal import Examples, Round
from demem.report import (
    ExampleFacts,
    GroupFacts,
    LayerChange,
    ReportData,
    ReportOptions,
    Touched,
    UnitFacts,
    VerdictFacts,
    look_at,
)
from demem.run.data import Rows, RunData, Split
from demem.run.passes import undisturbed
from demem.tracing import atypical_by_margin, class_mean, contrast, linear_impact, margins

READ = 5_000  # training examples whose accuracy is measured, evenly spaced
TOP_UNITS, DRIVERS = 6, 4


@dataclass(frozen=True)
class Before:
    """The network as trained, on the CPU.

    Attributes:
        train: training examples, with logits.
        memorized: ``(S,)`` their memorization scores (:func:`demem.tracing.contrast`), or ``None``.
        y, predicted, margin, atypical: ``(H,)`` of the held-out examples.
        units: of the head's input.
        driving: ``{unit: held-out examples (rows) that activate it most}``.
    """

    train: Rows
    memorized: Tensor | None
    y: Tensor
    predicted: Tensor
    margin: Tensor
    atypical: Tensor
    units: list[UnitFacts]
    driving: dict[int, list[int]]


def observe_before(data: RunData, trained: LinearHead, held_out: Examples, typical: Tensor) -> Before:
    """Read the network as trained; the same on every process, and one pass over at most 5,000 training examples.

    Args:
        data: of the run.
        trained: its head.
        held_out: what the head reads, classes and groups.
        typical: ``(C,)`` the typical group of each class.
    """
    site, z, y = data.head_input, held_out.features, held_out.y
    logits = trained(z)
    atypical = held_out.atypical(typical)
    if held_out.fewest_atypical(typical) < 2:
        atypical = atypical_by_margin(margins(logits, y), y)
    impact = linear_impact(z, trained.weight, y, logits=logits)
    on_atypical, on_typical = class_mean(impact, y, atypical), class_mean(impact, y, ~atypical)
    top = on_atypical.argsort(stable=True)[: min(TOP_UNITS, len(on_atypical))].tolist()
    driving = {u: z[:, u].topk(min(DRIVERS, len(z))).indices.tolist() for u in top}
    train = data.train.read([site], "Reading for the report", logits=True, limit=READ)
    memorized = _memorization(train, train.activations[site.name], trained, z.mean(0), on_atypical)
    return Before(
        _on_cpu(train),
        None if memorized is None else memorized.cpu(),
        y.cpu(),
        logits.argmax(1).cpu(),
        margins(logits, y).cpu(),
        atypical.cpu(),
        [
            UnitFacts(site.name, i, t, a, False)
            for i, (t, a) in enumerate(zip(on_typical.tolist(), on_atypical.tolist(), strict=True))
        ],
        driving,
    )


def observe_after(
    data: RunData,
    groups: Groups,
    positions: Tensor,
    before: Before,
    kept: Round | None,
    trained: Mapping[str, Tensor],
    options: ReportOptions,
) -> ReportData:
    """Read the network as it is now, and put together what is known; two passes.

    Args:
        data: of the run.
        groups: of its examples.
        positions: ``(S,)`` of the training examples in their data set, ascending.
        before: from :func:`observe_before`.
        kept: the round that was kept, if it was not the network as trained.
        trained: the parameters that the cure changed, as they were before.
        options: names, and how examples are shown.
    """
    held_out = _on_cpu(data.held_out.read([], "Reading for the report", logits=True))
    train = _on_cpu(data.train.read([], "Reading for the report", logits=True, limit=READ))
    if not torch.equal(held_out.y, before.y) or not torch.equal(train.position, before.train.position):
        raise ValueError("The data are not read in the same order twice, so before and after cannot be compared.")
    right = before.predicted == before.y
    right_after = right if kept is None else kept.right.cpu()
    # Positions beyond those that have a group (of a stream) get none.
    where = torch.searchsorted(positions, train.position).clamp(max=len(positions) - 1)
    index = torch.where(positions[where] == train.position, groups.index[where], -1)
    measured = _Measured(
        train.y,
        (_logits(before.train).argmax(1) == train.y),
        (_logits(train).argmax(1) == train.y),
        right,
        right_after,
        _logits(held_out).argmax(1) == held_out.y,
    )
    facts = _inferred(groups, index, measured)
    if train.group is not None and held_out.group is not None and not groups.known:
        facts += _true(train.group, held_out.group, held_out.y, measured)
    gate = torch.ones(len(before.units)) if kept is None else kept.gate.cpu()
    units = [replace(u, touched=bool(gate[u.unit] == 0)) for u in before.units]
    notes: list[str] = []
    examples, positions_of = _examples(data, groups, index, before, held_out, train, measured, options, notes)
    units = [
        replace(u, drivers=[positions_of[row] for row in before.driving[u.unit]]) if u.unit in before.driving else u
        for u in units
    ]
    masked = int((gate == 0).sum())
    return replace(
        observe_run(data, groups, options),
        train_read=len(train),
        groups=facts,
        examples=examples,
        units=units,
        touched=[] if kept is None else [Touched(data.head_input.name, masked, len(gate), "masked")],
        layers=_changes(trained, data),
        notes=notes,
    )


def _list(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else list(names)


def observe_run(data: RunData, groups: Groups, options: ReportOptions) -> ReportData:
    """What is known of a run without reading anything."""
    return ReportData(
        network=type(data.pl_module).__name__,
        created=time.strftime("%Y-%m-%d %H:%M"),
        verdict=VerdictFacts(
            groups.kind,
            groups.why,
            groups.site,
            groups.error,
            groups.sure,
            groups.epoch,
            groups.known,
            groups.shortcut,
            groups.num_classes,
        ),
        title=options.title,
        class_names=_list(options.class_names),
        attribute_names=_list(options.attribute_names),
        group_names=_list(options.group_names),
    )


@dataclass(frozen=True)
class _Measured:
    """Which examples are classified rightly, bool each: ``train_*`` ``(S,)``, ``held_out_*`` ``(H,)``."""

    train_y: Tensor
    train_before: Tensor
    train_after: Tensor
    held_out_before: Tensor
    held_out_after: Tensor
    held_out_now: Tensor

    def accuracies(self, train: Tensor, held_out: Tensor) -> dict[str, float | None]:
        """Of the examples in two boolean masks."""
        columns = {name: train for name in ("train_before", "train_after")}
        columns |= {name: held_out for name in ("held_out_before", "held_out_after", "held_out_now")}
        return {
            name: float(getattr(self, name)[mask].float().mean()) if bool(mask.any()) else None
            for name, mask in columns.items()
        }


def _inferred(groups: Groups, index: Tensor, measured: _Measured) -> list[GroupFacts]:
    facts, typical, sizes = [], groups.typical.tolist(), groups.sizes
    for g in sorted(set(groups.index.tolist()) | set(groups.held_out.tolist())):
        y, attribute = divmod(g, groups.num_classes)
        train, held_out = index == g, groups.held_out == g
        facts.append(
            GroupFacts(
                truth=False,
                index=g,
                y=None if groups.known else y,
                attribute=None if groups.known else attribute,
                minority=groups.informative and g not in typical,
                train=sizes[g] if g < len(sizes) else 0,
                held_out=int(held_out.sum()),
                **measured.accuracies(train, held_out),
            )
        )
    return facts


def _true(train: Tensor, held_out: Tensor, held_out_y: Tensor, measured: _Measured) -> list[GroupFacts]:
    classes = int(max(measured.train_y.max(), held_out_y.max())) + 1
    typical = largest_groups(measured.train_y, train, classes).tolist()
    facts = []
    for g in sorted(set(train.tolist()) | set(held_out.tolist())):
        own = {*measured.train_y[train == g].tolist(), *held_out_y[held_out == g].tolist()}
        facts.append(
            GroupFacts(
                truth=True,
                index=g,
                y=own.pop() if len(own) == 1 else None,
                attribute=None,
                minority=g not in typical,
                train=int((train == g).sum()),
                held_out=int((held_out == g).sum()),
                **measured.accuracies(train == g, held_out == g),
            )
        )
    return facts


def _examples(
    data: RunData,
    groups: Groups,
    index: Tensor,
    before: Before,
    held_out: Rows,
    train: Rows,
    measured: _Measured,
    options: ReportOptions,
    notes: list[str],
) -> tuple[list[ExampleFacts], dict[int, int]]:
    """The examples to show, with their content, and ``{row of a held-out example: its position}``."""
    count, y = options.examples, before.y
    right, margin = before.predicted == y, before.margin
    ordinary = (~before.atypical & right).nonzero()[:, 0]
    distance = (margin - (margin[ordinary].median() if len(ordinary) else 0.0)).abs()
    rows = {
        "typical": _class_by_class(ordinary, distance, y, count),
        "atypical": _class_by_class(before.atypical.nonzero()[:, 0], margin, y, count),
        "driver": list(dict.fromkeys(row for these in before.driving.values() for row in these)),
    }
    facts = []
    for kind, chosen in rows.items():
        for row in chosen:
            attribute = None if groups.known else int(groups.held_out[row]) % groups.num_classes
            facts.append(
                ExampleFacts(
                    kind,
                    "held_out",
                    int(held_out.position[row]),
                    int(y[row]),
                    int(before.predicted[row]),
                    bool(measured.held_out_after[row]),
                    attribute,
                    None if held_out.group is None else int(held_out.group[row]),
                    float(margin[row]),
                )
            )
    if before.memorized is not None:
        known = measured.train_before.nonzero()[:, 0]
        order = known[before.memorized[known].argsort(descending=True, stable=True)][:count]
        for row in order.tolist():
            attribute = None if groups.known or index[row] < 0 else int(index[row]) % groups.num_classes
            facts.append(
                ExampleFacts(
                    "memorised",
                    "train",
                    int(train.position[row]),
                    int(train.y[row]),
                    int(_logits(before.train)[row].argmax()),
                    bool(measured.train_after[row]),
                    attribute,
                    None if train.group is None else int(train.group[row]),
                    float(before.memorized[row]),
                )
            )
    positions_of = {row: int(held_out.position[row]) for row in rows["driver"]}
    if not data.trainer.is_global_zero:
        return facts, positions_of
    for split, name in ((data.train, "train"), (data.held_out, "held_out")):
        wanted = sorted({fact.position for fact in facts if fact.split == name})
        owner = "train" if data.kept_back is not None else name  # the data set that the positions are of
        content = _content(split, owner, wanted, options, notes)
        facts = [replace(f, **content[f.position]) if f.split == name and f.position in content else f for f in facts]
    return facts, positions_of


def _class_by_class(rows: Tensor, score: Tensor, y: Tensor, count: int) -> list[int]:
    """The rows with the lowest score, from each class in turn."""
    ordered = rows[score[rows].argsort(stable=True)].tolist()
    turns: dict[int, int] = {}
    keyed: list[tuple[int, int, int]] = []
    for row in ordered:
        label = int(y[row])
        turns[label] = turns.get(label, 0) + 1
        keyed.append((turns[label], len(keyed), row))
    return [row for _, _, row in sorted(keyed)[:count]]


def _content(
    split: Split, name: str, positions: Sequence[int], options: ReportOptions, notes: list[str]
) -> dict[int, dict[str, Any]]:
    """What examples look like, by position; on one process alone."""
    found: dict[int, dict[str, Any]] = {}
    if not positions:
        return found
    try:
        if options.show is not None:
            for position in positions:
                shown = options.show(name, position)
                if shown is not None:
                    found[position] = look_at(shown, lambda value: value, options.feature_names)
        rest = [p for p in positions if p not in found]
        if rest and not split.has_positions:
            notes.append(f"The {name.replace('_', '-')} data are a stream, so single examples cannot be shown.")
        elif rest:
            with undisturbed(split.trainer, split.pl_module):
                batches = list(split.batches_at(torch.tensor(rest), split.batch_size))
            inputs = [row for batch in batches for row in _rows(batch.x, len(batch.y))]
            for position, x in zip(rest, inputs, strict=True):
                found[position] = look_at(x, options.decode, options.feature_names)
    except Exception as error:  # what a person looks at is not worth a report
        notes.append(f"Some {name.replace('_', '-')} examples cannot be shown, because {type(error).__name__}: {error}")
    return found


def _rows(x: Any, size: int) -> list[Any]:
    if isinstance(x, Mapping):
        columns = {k: _rows(v, size) for k, v in x.items()}
        return [{k: v[i] for k, v in columns.items()} for i in range(size)]
    if isinstance(x, Tensor):
        return list(x.cpu()) if len(x) == size else list(x.cpu().transpose(0, 1))  # inputs may be (T, B)
    if isinstance(x, list | tuple) and x and all(isinstance(part, Tensor) and len(part) == size for part in x):
        return [tuple(part[i].cpu() for part in x) for i in range(size)]
    return list(x) if isinstance(x, list | tuple) and len(x) == size else [x] * size


def _memorization(train: Rows, z: Tensor, trained: LinearHead, centre: Tensor, on_atypical: Tensor) -> Tensor | None:
    """Memorization scores ``(S,)``; the units that cost the atypical examples memorise, or the half that is worst for
    them, if all or none do."""
    memorising = on_atypical < 0
    if bool(memorising.all()) or not bool(memorising.any()):
        memorising = on_atypical < on_atypical.median()
    if not bool(memorising.any()) or len(train) < 2:
        return None
    impact = linear_impact(z, trained.weight, train.y, logits=_logits(train), centre=centre)
    return contrast(impact[:, ~memorising].sum(1), impact[:, memorising].sum(1))


def _changes(trained: Mapping[str, Tensor], data: RunData) -> list[LayerChange]:
    """How far the weights of each layer have moved, in the order of the network; empty if none has."""
    squares: dict[str, tuple[float, float]] = {}
    for name, parameter in data.pl_module.named_parameters() if trained else ():
        now, layer = parameter.detach().cpu().double(), name.rpartition(".")[0]
        old = trained[name].double() if name in trained else now
        moved, size = squares.get(layer, (0.0, 0.0))
        squares[layer] = moved + float((now - old).square().sum()), size + float(old.square().sum())
    return [LayerChange(layer, (moved / size) ** 0.5 if size else 0.0) for layer, (moved, size) in squares.items()]


def _logits(rows: Rows) -> Tensor:
    if rows.logits is None:
        raise ValueError("The logits have not been read.")
    return rows.logits


def _on_cpu(rows: Rows) -> Rows:
    """Labels, groups and logits on the CPU, without activations."""
    group = None if rows.group is None else rows.group.cpu()
    return Rows(rows.position.cpu(), rows.y.cpu(), group, {}, _logits(rows).float().cpu())
