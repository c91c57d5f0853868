"""The sentences of a report: what was found, how sure that is, what was done, and how to undo it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from demem.groups import Groups, is_confirmed
from demem.removal import RoundRecord
from demem.report.facts import GroupFacts, ReportData, VerdictFacts, name_of

CLEARLY_SURE, CLEARLY_UNSURE = 0.42, 0.28  # measured: shortcuts from .42, hard examples up to .28

COSTLY = 2.0  # points of the average that a cure may cost unremarked
LISTED = 4  # classes; the group sizes of more are summed

_HEADLINES = {
    "shortcut": "Shortcut found",
    "label noise": "Some labels look wrong, and no shortcut is seen beside them",
    "hard examples": "No shortcut: only hard examples",
    "nothing": "No shortcut found",
    "undecided": "Undecided",
}
_MEANINGS = {
    "shortcut": (
        "Something easier than the class goes along with it in most training examples. A network that is trained as "
        "usual leans on it, memorises the examples where it fails, and gets unseen ones of that kind wrong."
    ),
    "label noise": (
        "An early layer is sure of its mistakes, and a second look sides with it and not with the labels. Look at the "
        "examples below before you train on them."
    ),
    "hard examples": (
        "An early layer is unsure where it is wrong, as it is on examples that are merely difficult. No attribute that "
        "misleads it was found."
    ),
    "nothing": "An early layer makes hardly any mistakes that a better look would not make as well.",
    "undecided": (
        "The evidence is too thin to say whether the mistakes of an early layer are those of a shortcut. The network "
        "was trained as usual."
    ),
    "known": "The groups of the held-out examples were given, and those of the training examples inferred from them.",
}


_ADVICE = {
    "shortcut": (
        "To do: look at the atypical examples, name what they share, and judge the network on new data of that kind."
    ),
    "label noise": "To do: check the memorised and the atypical examples for wrong labels, then train again.",
    "hard examples": "To do: nothing about shortcuts; more data of the kind shown as atypical helps.",
    "nothing": "To do: nothing about shortcuts.",
    "undecided": "To do: train with more data or more held-out examples, and look again.",
}


@dataclass(frozen=True)
class Words:
    """A sentence that says it, how sure that is, and what it means.

    Attributes:
        kind: of the verdict, or ``"known"``, ``"none"``.
        headline, sure, meaning, advice: the words.
    """

    kind: str
    headline: str
    sure: str
    meaning: str
    advice: str = ""


def group_word(verdict: VerdictFacts | Groups | None, count: int = 1) -> str:
    """What a reader calls the groups that the cure goes by: without a shortcut they are the classes.

    Args:
        verdict: of the run.
        count: of groups; more than one are a plural.

    Example:
        >>> facts = VerdictFacts("nothing", "", "layer1", 0.01, 0.1, 0, False, False, 2)
        >>> group_word(facts), group_word(facts, 2)
        ('class', 'classes')
    """
    if verdict is None:
        return "group" if count == 1 else "groups"
    if not (verdict.known or verdict.shortcut):
        return "class" if count == 1 else "classes"
    return ("given group" if verdict.known else "inferred group") + "s" * (count != 1)


def verdict_words(verdict: VerdictFacts | Groups | None) -> Words:
    """Say what was found.

    Args:
        verdict: the detector's result, ``None`` if it did not run.

    Example:
        >>> facts = VerdictFacts("shortcut", "", "layer1", 0.05, 0.9, 0, False, True, 2)
        >>> words = verdict_words(facts)
        >>> words.headline, words.sure
        ('Shortcut found', 'clear')
    """
    if verdict is None:
        return Words("none", "Nothing was looked for", "", "Training did not begin, or was a dry run.")
    if verdict.known:
        return Words("known", "Groups were given", "", _MEANINGS["known"])
    kind = verdict.kind
    if kind == "undecided":
        sure = "not sure"
    elif kind == "nothing":
        sure = ""
    elif verdict.shortcut and not _confirmed(verdict):
        sure = "likely"
    elif verdict.shortcut or kind == "label noise":
        sure = "clear" if verdict.sure >= CLEARLY_SURE else "close call"
    else:
        sure = "clear" if verdict.sure <= CLEARLY_UNSURE else "close call"
    return Words(kind, _HEADLINES[kind], sure, _MEANINGS[kind], _ADVICE[kind])


def evidence(verdict: VerdictFacts | Groups) -> list[str]:
    """Why: the probe's figures, and what a second look says; its figures are in ``verdict.why``.

    Example:
        >>> evidence(VerdictFacts("shortcut", "", "layer1", 0.05, 0.9, 0, False, True, 2))[0][:54]
        'A linear probe of layer1, read before training, mistak'
    """
    when = "before training" if verdict.epoch == 0 else f"after {_count(verdict.epoch, 'epoch')}"
    lines = [
        f"A linear probe of {verdict.site}, read {when}, mistakes the class of {verdict.error:.1%} of the training "
        f"examples (mean over classes) when it is fitted without them, and is as sure of {verdict.sure:.0%} of these "
        "mistakes as of its right answers but the least sure twentieth. Where that was measured it was up to 28% for "
        "hard examples, and 42% and more for a shortcut."
    ]
    if verdict.why and verdict.shortcut and not _confirmed(verdict):
        lines.append(
            f"A second look does not confirm it: {_in_words(verdict.why)}. The groups count all the same, as a "
            "minority of this size costs little if it was merely hard."
        )
    elif verdict.why:
        said = _in_words(verdict.why)
        lines.append(f"{said[0].upper()}{said[1:]}.")
    return lines


def actions(data: ReportData) -> list[str]:
    """What was done, one sentence per step.

    Example:
        >>> actions(ReportData("Net", "today", None))
        ['Training drew the examples as it would have without demem.', 'The network stays as it was trained.']
    """
    kept, steps = data.kept, []
    if data.rebalanced:
        steps.append(f"Training drew the {group_word(data.verdict, 2)} equally often.")
    else:
        steps.append("Training drew the examples as it would have without demem.")
    if data.failed:
        return [*steps, "The cure failed, so the network stays as it was trained; the warning in the log says why."]
    forgetting = [t for t in data.touched if t.epoch is not None]
    if forgetting:
        epochs = sorted({t.epoch for t in forgetting if t.epoch is not None})
        steps.append(f"In epoch {epochs[0]} to {epochs[-1]} units were {forgetting[0].how}.")
    why = "" if kept is None else reason(data.verdict, data.rounds)
    if kept is None or not kept.refitted:
        return [*steps, f"The network stays as it was trained{why}."]
    if kept.ordinary:
        return [*steps, f"The head was refitted on held-out examples, all alike{why}."]
    masked = sum(t.units for t in data.touched if t.epoch is None)
    total = sum(t.total for t in data.touched if t.epoch is None)
    if masked:
        steps.append(f"{masked} of the {total} units that the head reads ({kept.share:.0%}) were masked.")
    else:
        worst_one = group_word(data.verdict)
        steps.append(f"No unit was masked: with this refit, masks did not raise the worst {worst_one} further.")
    heavy = f"; atypical examples weigh {kept.weight:g} times as much" if kept.weight > 1 else ""
    equal = group_word(data.verdict, 2)
    steps.append(f"The head was refitted on held-out examples, all {equal} in equal numbers{heavy}{why}.")
    if data.fine_tuned_on:
        steps.append(
            f"The network was fine-tuned on {data.fine_tuned_on} held-out examples, balanced over the {equal}."
        )
    return steps


def contradiction(data: ReportData) -> str | None:
    """Say where true groups show a shortcut that the verdict denies: two groups of one class, each with at least 20
    held-out examples, whose accuracies as trained differ by at least 20 points.

    Example:
        >>> make = lambda i, accuracy: GroupFacts(True, i, 0, None, False, 9, 50, 1.0, accuracy, 1.0, 1.0, 1.0)
        >>> facts = VerdictFacts("nothing", "", "layer1", 0.01, 0.1, 0, False, False, 2)
        >>> data = ReportData("Net", "today", facts, groups=[make(0, 0.95), make(1, 0.4)])
        >>> contradiction(data)[:68]
        'The groups in your batches say otherwise: within class 0 the network'
    """
    if data.verdict is None or data.verdict.shortcut or data.verdict.known:
        return None
    found = []
    for y in {g.y for g in data.groups if g.truth and g.y is not None}:
        measured = [
            g for g in data.groups if g.truth and g.y == y and g.held_out >= 20 and g.held_out_before is not None
        ]
        accuracies = {data.group_name(g): g.held_out_before or 0.0 for g in measured}
        if accuracies:
            low, high = min(accuracies, key=accuracies.__getitem__), max(accuracies, key=accuracies.__getitem__)
            found.append((accuracies[high] - accuracies[low], y, low, high))
    difference, y, low, high = max(found, default=(0.0, 0, "", ""))
    if y is None or difference < 0.2:
        return None
    return (
        f"The groups in your batches say otherwise: within {data.class_name(y)} the network as trained differs by "
        f"{100 * difference:.0f} points of accuracy on held-out data, between {high} and {low}. "
        "MemorizationRemover(use_groups=True) makes use of them."
    )


def gap(group: GroupFacts, after: bool) -> float | None:
    """Memorization gap: training minus held-out accuracy, a fraction.

    Example:
        >>> group = GroupFacts(False, 1, 0, 1, True, 9, 9, 1.0, 0.6, 0.9, 0.8, 0.9)
        >>> round(gap(group, after=False), 2), round(gap(group, after=True), 2)
        (0.4, 0.1)
    """
    train, held_out = (
        (group.train_after, group.held_out_after) if after else (group.train_before, group.held_out_before)
    )
    return None if train is None or held_out is None else train - held_out


def worst(groups: list[GroupFacts], fewest: int = 5) -> GroupFacts | None:
    """The group with the lowest held-out accuracy as trained; small ones count only if there are no others.

    Example:
        >>> make = lambda i, size, accuracy: GroupFacts(False, i, 0, i, False, 9, size, 1.0, accuracy, 1.0, 1.0, 1.0)
        >>> worst([make(0, 50, 0.9), make(1, 50, 0.6), make(2, 3, 0.0)]).index
        1
    """
    measured = [g for g in groups if g.held_out_before is not None]
    judged = [g for g in measured if g.held_out >= fewest] or measured
    return min(judged, key=lambda g: g.held_out_before or 0.0, default=None)


def average(data: ReportData, after: bool) -> float | None:
    """Accuracy over all held-out examples, a fraction; ``after`` by heads that were refitted without the example.

    Example:
        >>> make = lambda i, size, b, a: GroupFacts(False, i, 0, i, False, 9, size, 1.0, b, 1.0, a, 1.0)
        >>> data = ReportData("Net", "today", None, groups=[make(0, 90, 1.0, 0.9), make(1, 10, 0.5, 0.9)])
        >>> round(average(data, after=False), 2), round(average(data, after=True), 2)
        (0.95, 0.9)
    """
    pairs = [(g.held_out, g.held_out_after if after else g.held_out_before) for g in data.groups if not g.truth]
    known = [(size, accuracy) for size, accuracy in pairs if size and accuracy is not None]
    total = sum(size for size, _ in known)
    return sum(size * accuracy for size, accuracy in known) / total if total else None


def outcome(data: ReportData) -> str:
    """Say what the cure gained and what it cost, so that a gain for a few is not read without the loss of the many.

    Empty where nothing was refitted.

    Example:
        >>> make = lambda i, size, b, a: GroupFacts(False, i, 0, i, False, 9, size, 1.0, b, 1.0, a, 1.0)
        >>> rounds = [RoundRecord(False, 0.0, 0.5, False), RoundRecord(True, 0.0, 0.9, True)]
        >>> groups = [make(0, 90, 1.0, 0.9), make(1, 10, 0.5, 0.9)]
        >>> outcome(ReportData("Net", "today", None, rounds=rounds, groups=groups))
        'The worst group gained 40.0 points, and the average over the held-out examples lost 5.0.'
    """
    before, after, kept = average(data, after=False), average(data, after=True), data.kept
    if kept is None or not kept.refitted or before is None or after is None:
        return ""
    worst_group, mean = 100 * (kept.worst - data.rounds[0].worst), 100 * (after - before)
    said = (
        f"The worst {group_word(data.verdict)} {_change(worst_group)} points, and the average over the held-out "
        f"examples {_change(mean)}."
    )
    if mean < -COSTLY and -mean > worst_group / 2:
        said += (
            " That is a high price: unless examples like the minority will be as frequent where the network is used, "
            "it is better as it was trained."
        )
    return said


def reason(verdict: VerdictFacts | Groups | None, rounds: Sequence[RoundRecord]) -> str:
    """Why the network stays as it was trained or gets an ordinary head, or why a refit is kept although a number falls;
    else empty.

    Args:
        verdict: of the run.
        rounds: the network as trained first; none where the cure failed or is still to come.

    Example:
        >>> rounds = [RoundRecord(False, 0.0, 0.9, True, why="a refit is not clearly better")]
        >>> reason(None, rounds), reason(None, [])
        (': a refit is not clearly better', ': it has not been refitted, or that failed with a warning')
    """
    kept = next((record for record in rounds if record.chosen), None)
    if kept is None:
        return ": it has not been refitted, or that failed with a warning"
    if not kept.refitted or kept.ordinary:
        return f": {kept.why}" if kept.why else ""
    falls = [f"the worst {group_word(verdict)}"] * _falls(rounds[0].worst, kept.worst)
    falls += ["the average"] * _falls(rounds[0].average, kept.average)
    if not falls or not kept.why:
        return ""
    return f"; this is kept although {' and '.join(falls)} {'fall' if falls[1:] else 'falls'}: {kept.why}"


def _falls(before: float | None, after: float | None) -> bool:
    """Whether an accuracy is lower after, to the tenth of a point that is shown."""
    return before is not None and after is not None and round(1000 * after) < round(1000 * before)


def _change(points: float) -> str:
    return f"{'gained' if points >= 0 else 'lost'} {abs(points):.1f}"


SCORES = {
    "typical": "logit of the label minus the largest other, of the network as trained; positive is right",
    "atypical": "logit of the label minus the largest other, of the network as trained; negative is wrong",
    "memorised": (
        "how much more the ordinary units help the example, and the memorising ones fail it, than they do others; in "
        "standard deviations, high is memorised"
    ),
}


def summarise(
    groups: Groups | None,
    rounds: list[RoundRecord],
    fine_tuned_on: int,
    rebalanced: bool,
    report: str | None = None,
    class_names: Sequence[str] | None = None,
) -> str:
    """Say in five lines what was found, done and gained.

    Args:
        groups: of the run; ``None`` before training.
        rounds: see :class:`demem.removal.RoundRecord`.
        fine_tuned_on: held-out examples.
        rebalanced: training draws the inferred groups equally often where they say more than the classes.
        report: where the report is.
        class_names: one per class; ``class 0`` and so on without them.

    Example:
        >>> print(summarise(None, [], 0, True))
        demem: nothing was looked for (training has not begun, or was a dry run).
    """
    if groups is None:
        return "demem: nothing was looked for (training has not begun, or was a dry run)."
    words = verdict_words(groups)
    sure = f" ({words.sure})" if words.sure else ""
    why = f": {_in_words(groups.why)}" if groups.why else ""
    if groups.shortcut and not _confirmed(groups):  # what a closer look says after it contradicts the words before
        why = f"{why.partition(';')[0]}; a second look does not confirm it"
    kept = next((record for record in rounds if record.chosen), None)
    what = group_word(groups)
    if groups.informative:
        sizes = f"{_sizes(groups, class_names)} ({group_word(groups, 2)} of the training examples)"
    else:
        sizes = "the groups are the classes"
    balanced = rebalanced and groups.informative
    first = "training drew the groups equally often" if balanced else "trained as usual"
    told = reason(groups, rounds)
    if kept is None or not kept.refitted:
        done, gained = f"{first}; the network stays as it was trained{told}", "the network is as it was trained"
        if rounds and math.isfinite(rounds[0].worst):
            gained += f"; worst {what} {rounds[0].worst:.1%} on held-out data"
    else:
        masked = f"{kept.share:.0%} of the units that the head reads masked" if kept.share else "no unit masked"
        tuning = ", before the fine-tuning" if fine_tuned_on else ""
        before = "what was before had trained on balanced groups" if balanced else "before: as it was trained"
        tuned = f", fine-tuned on {fine_tuned_on} held-out examples" if fine_tuned_on else ""
        alike = " on held-out examples, all alike" * kept.ordinary
        done = f"{first}; {masked}, head refitted{alike}{tuned}{told}"
        gained = (
            f"worst {what} {rounds[0].worst:.1%} → {kept.worst:.1%}{_averages(rounds[0], kept)} on held-out data "
            f"(cross-fitted: each example judged by a head fitted without it{tuning}; {before})"
            f"{_price(rounds[0], kept)}"
        )
    lines = [
        f"verdict  {words.headline}{sure}{why}",
        f"groups   probe of {groups.site!r}, error {groups.error:.1%}: {sizes}",
        f"done     {done}",
        f"result   {gained}",
        f"report   {report or 'none; MemorizationRemover(report=...) writes one'}",
    ]
    return "\n".join(f"demem: {line}" for line in lines)


def _in_words(why: str) -> str:
    """The sentence of a verdict without its figures, which stand in brackets at the end."""
    return why.partition(" (")[0]


def _sizes(groups: Groups, names: Sequence[str] | None) -> str:
    """How many training examples are typical of their class and how many are not: of each class, or of all."""
    typical = groups.index == groups.typical[groups.y]
    if groups.num_classes > LISTED:
        of = [(f"{groups.num_classes} classes", torch.ones_like(typical))]
    else:
        of = [(name_of(names, c, "class {}"), groups.y == c) for c in range(groups.num_classes)]
    return ", ".join(
        f"{name}: {int(typical[y].sum())} typical and {int((~typical)[y].sum())} atypical" for name, y in of
    )


def _confirmed(verdict: VerdictFacts | Groups) -> bool:
    return not verdict.why or is_confirmed(verdict.why)


def _price(trained: RoundRecord, kept: RoundRecord) -> str:
    lost = 0.0 if trained.average is None or kept.average is None else 100 * (trained.average - kept.average)
    return f"; it costs {lost:.1f} points of the average" if lost > COSTLY else ""


def _averages(trained: RoundRecord, kept: RoundRecord) -> str:
    if trained.average is None or kept.average is None:
        return ""
    return f", average {trained.average:.1%} → {kept.average:.1%}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
