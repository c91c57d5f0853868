"""What a report is made of: plain numbers, words and small pictures, which go to JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from demem.removal import Forgotten, RoundRecord
from demem.report.files import write_whole

VERSION = 1

Content = str | Tensor | Mapping[str, Any]
"""What a person can look at: text, a picture ``(C, H, W)``, or the named values of a row."""


@dataclass(frozen=True)
class ReportOptions:
    """Where a report goes, and the words and pictures in it.

    Attributes:
        path: the HTML file; a relative path lies in the run's folder (the logger's, else ``default_root_dir``).  What
            the report is made of is written beside it, with the ending ``.json``.
        title: first line of the report.
        class_names: one per class.
        attribute_names: one per class: what usually goes with it (``["water", "land"]``), the names of the inferred
            attribute.
        group_names: one per true group, where the batches carry groups.
        feature_names: columns of tabular inputs ``(B, N)``.
        decode: turns the input of one example (token ids, a vector …) into text, a picture ``(C, H, W)`` or a row
            ``{name: value}``; without it token ids are shown as numbers.
        show: the same from ``("train" or "held_out", position in that data set)``, where the network's inputs cannot be
            shown, such as cached features; it is asked first.  Held-out examples that were kept back from the training
            set are ``"train"``.
        examples: number of examples of each kind.
    """

    path: str = "report.html"
    title: str = "What the network memorised"
    class_names: Sequence[str] | None = None
    attribute_names: Sequence[str] | None = None
    group_names: Sequence[str] | None = None
    feature_names: Sequence[str] | None = None
    decode: Callable[[Any], Content] | None = None
    show: Callable[[str, int], Content | None] | None = None
    examples: int = 6


@dataclass(frozen=True)
class VerdictFacts:
    """The verdict on the probe's mistakes, from :class:`demem.groups.Groups`, see there."""

    kind: str
    why: str
    site: str
    error: float
    sure: float
    epoch: int
    known: bool
    shortcut: bool
    num_classes: int


@dataclass(frozen=True)
class GroupFacts:
    """Accuracies of one group, fractions; ``None`` where it has no examples or was not measured.

    Attributes:
        truth: true groups (from the batches) or inferred ones.
        index: of the group.
        y, attribute: class and inferred attribute; a true group has no attribute, and no class if it spans several.
        minority: whether it is another than its class's largest group in the training set.
        train, held_out: number of examples.
        train_before, held_out_before: of the network as trained.
        train_after: of the network as it is now.
        held_out_after: of heads that were refitted without the example (cross-fitted); of the network as trained if
            its head was not refitted.
        held_out_now: of the network as it is now, whose head has seen the labels: optimistic.
    """

    truth: bool
    index: int
    y: int | None
    attribute: int | None
    minority: bool
    train: int
    held_out: int
    train_before: float | None
    held_out_before: float | None
    train_after: float | None
    held_out_after: float | None
    held_out_now: float | None


@dataclass(frozen=True)
class ExampleFacts:
    """One example and what the network makes of it.

    Attributes:
        kind: ``"typical"``, ``"atypical"``, ``"memorised"``, or ``"driver"`` of a unit.
        split: ``"train"`` or ``"held_out"``.
        position: in the data set.
        y, predicted: class, and what the network as trained predicts.
        right_after: whether it is classified rightly by a head that was refitted without it (held out), or by the
            network as it is now (train).
        attribute: inferred, or ``None`` if unknown.
        group: true group, or ``None``.
        score: the margin in logits; of a memorised example its memorization score in standard deviations.
        text, picture, row: the content, one of them; the picture as a ``data:`` address.
        pixels: width of the picture as the network sees it.
    """

    kind: str
    split: str
    position: int
    y: int
    predicted: int
    right_after: bool | None
    attribute: int | None
    group: int | None
    score: float
    text: str | None = None
    picture: str | None = None
    row: dict[str, str] | None = None
    pixels: int = 0


@dataclass(frozen=True)
class UnitFacts:
    """One unit: mean impact on typical and on atypical held-out examples in logits (positive: it helps them).

    Attributes:
        site, unit: which.
        on_typical, on_atypical: the impacts, under the head as trained.
        touched: whether it was masked.
        drivers: positions of the held-out examples that activate it most, for the units that are shown in detail.
    """

    site: str
    unit: int
    on_typical: float
    on_atypical: float
    touched: bool
    drivers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Touched:
    """Units of one layer that something was done to.

    Attributes:
        site: the layer.
        units: how many were touched.
        total: how many it has.
        how: what was done.
        epoch: in which epoch; ``None`` after training.
    """

    site: str
    units: int
    total: int
    how: str
    epoch: int | None = None


@dataclass(frozen=True)
class LayerChange:
    """How much the cure changed the weights of a layer: norm of the difference over norm before."""

    layer: str
    change: float


@dataclass(frozen=True)
class ReportData:
    """All that is known of a run.  ``None``, an empty list or 0 stand for what was not measured.

    Attributes:
        network: name of the module's class.
        created: date and time.
        verdict: of the detector.
        rebalanced: whether training drew the inferred groups equally often.
        rounds: see :class:`demem.removal.RoundRecord`; the network as trained first.
        fine_tuned_on: held-out examples.
        failed: the cure failed, and the network is as it was trained.
        epochs: of training.
        fit_seconds, callback_seconds, report_seconds: of the whole fit; of the remover in it, without this report; of
            this report's passes over the data.
        train_read: training examples that accuracies are measured on.
        groups, examples, units, touched, layers: see their classes.
        diversity: rows of ``ActivationDiversityMonitor.history``.
        undo: file with the parameters as trained, if it was written.
        title, class_names, attribute_names, group_names: see :class:`ReportOptions`.
        notes: what could not be shown, and why.
    """

    network: str
    created: str
    verdict: VerdictFacts | None
    rebalanced: bool = False
    rounds: list[RoundRecord] = field(default_factory=list)
    fine_tuned_on: int = 0
    failed: bool = False
    epochs: int = 0
    fit_seconds: float = 0.0
    callback_seconds: float = 0.0
    report_seconds: float = 0.0
    train_read: int = 0
    groups: list[GroupFacts] = field(default_factory=list)
    examples: list[ExampleFacts] = field(default_factory=list)
    units: list[UnitFacts] = field(default_factory=list)
    touched: list[Touched] = field(default_factory=list)
    layers: list[LayerChange] = field(default_factory=list)
    diversity: list[dict[str, float]] = field(default_factory=list)
    undo: str | None = None
    title: str = "What the network memorised"
    class_names: list[str] | None = None
    attribute_names: list[str] | None = None
    group_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    version: int = VERSION

    @property
    def kept(self) -> RoundRecord | None:
        """The round that was kept."""
        return next((record for record in self.rounds if record.chosen), None)

    @property
    def refitted(self) -> bool:
        """Whether the head was refitted."""
        return self.kept is not None and self.kept.refitted

    def class_name(self, y: int) -> str:
        """The class's given name, or its number."""
        return name_of(self.class_names, y, "class {}")

    def attribute_name(self, attribute: int) -> str:
        """The inferred attribute's given name, or the class that it usually goes with."""
        if self.attribute_names is not None and attribute < len(self.attribute_names):
            return self.attribute_names[attribute]
        return f"looks like {self.class_name(attribute)}"

    def true_group_name(self, group: int) -> str:
        """The given name of a group of the batches, or its number, which says that it is one of these."""
        return name_of(self.group_names, group, "true group {}")

    def group_name(self, group: GroupFacts) -> str:
        """What a reader calls the group."""
        if group.y is None or group.truth:
            return self.true_group_name(group.index)
        name = self.class_name(group.y)
        informative = self.verdict is not None and self.verdict.shortcut and group.attribute is not None
        return (
            f"{name} · {self.attribute_name(group.attribute)}" if informative and group.attribute is not None else name
        )


def name_of(names: Sequence[str] | None, index: int, otherwise: str) -> str:
    """The name that was given, or ``otherwise`` with the index in it.

    >>> name_of(["cat"], 0, "class {}"), name_of(["cat"], 1, "class {}")
    ('cat', 'class 1')
    """
    return names[index] if names is not None and index < len(names) else otherwise.format(index)


_NESTED: dict[str, Any] = {
    "rounds": RoundRecord,
    "groups": GroupFacts,
    "examples": ExampleFacts,
    "units": UnitFacts,
    "touched": Touched,
    "layers": LayerChange,
}


def save(data: ReportData, path: str | Path) -> Path:
    """Write the data as JSON, whole or not at all.

    Example:
        >>> save(ReportData("Net", "today", None), "report.json").name
        'report.json'
    """
    return write_whole(path, json.dumps(_finite(asdict(data)), indent=1))


def load(path: str | Path) -> ReportData:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: the file is none of a report, or one of another version.

    Example:
        >>> load(save(ReportData("Net", "today", None), "report.json")).network
        'Net'
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise ValueError(f"it is of version {values['version']}, and this demem reads {VERSION}")
        values |= {name: [kind(**row) for row in values[name]] for name, kind in _NESTED.items()}
        values["verdict"] = None if values["verdict"] is None else VerdictFacts(**values["verdict"])
        return ReportData(**{f.name: values[f.name] for f in fields(ReportData)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold the data of a report: {error}.") from error


def touched_by_forgetting(epoch: int, forgotten: Forgotten) -> list[Touched]:
    """One row per layer for what :class:`demem.removal.Forgetting` did in an epoch.

    Example:
        >>> forgotten = Forgotten(10, 0.1, (), {"conv": 32})
        >>> touched_by_forgetting(3, forgotten)
        [Touched(site='conv', units=0, total=32, how='made to forget the attribute', epoch=3)]
    """
    return [
        Touched(site, sum(u.site == site for u in forgotten.units), size, "made to forget the attribute", epoch)
        for site, size in forgotten.sizes.items()
    ]


def _finite(value: Any) -> Any:
    """The same with ``None`` for NaN and infinity, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
