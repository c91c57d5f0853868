"""Rows of a comparison: which belong together, and the statistics over their seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.results import HELD_OUT

Row = dict[str, Any]
Arm = tuple[str, str]  # method, tier
Panel = tuple[str, str]  # data set, held-out source: what arms are compared within

FEWEST = 3  # seeds; the interval of two spans more than there is to span


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each arm, data set and seed; of several numbers of epochs on disk the last one written."""
    epochs = {row["data"]: row["epochs"] for row in rows}
    kept = {(*arm(row), *panel(row), row["seed"]): row for row in rows if row["epochs"] == epochs[row["data"]]}
    return list(kept.values())


def arm(row: Row) -> Arm:
    return row["method"], row["tier"]


def arms(rows: list[Row]) -> dict[Arm, list[Row]]:
    """The rows of each arm, of one data set and held-out source."""
    found: dict[Arm, list[Row]] = defaultdict(list)
    for row in rows:
        found[arm(row)].append(row)
    return dict(found)


def panel(row: Row) -> Panel:
    return row["data"], row["held_out"]


def panels(rows: list[Row]) -> dict[Panel, list[Row]]:
    """The rows by data set, as they come, and held-out source, from the least to the most held-out data."""
    data = list(dict.fromkeys(row["data"] for row in rows))
    found: dict[Panel, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (data.index(row["data"]), HELD_OUT.index(row["held_out"]))):
        found[panel(row)].append(row)
    return dict(found)


def by_tier(found: dict[Arm, list[Row]]) -> dict[str, list[Arm]]:
    """The arms of each tier, from few to many group labels; within one the best worst group first."""
    order = sorted(found, key=lambda a: (a[1], -mean(r["worst_group_acc"] for r in found[a])))
    tiers: dict[str, list[Arm]] = defaultdict(list)
    for name in order:
        tiers[name[1]].append(name)
    return dict(tiers)


def paired(rows: list[Row], reference: list[Row]) -> tuple[float, float, float] | None:
    """Mean difference in worst-group accuracy on shared seeds, half its 95% interval, and the p of a paired t-test."""
    from scipy import stats

    base = {row["seed"]: row["worst_group_acc"] for row in reference}
    differences = [row["worst_group_acc"] - base[row["seed"]] for row in rows if row["seed"] in base]
    if not differences:
        return None
    half, p = math.nan, math.nan
    if len(differences) > 1 and stdev(differences) > 0:
        half = interval(differences)
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return mean(differences), half, p


def interval(values: Sequence[float]) -> float:
    """Half the 95% interval of the mean (t); 0 for a single value."""
    from scipy import stats

    if len(values) < 2:
        return 0.0
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation in percent."""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def seeds_in_words(rows: list[Row]) -> str:
    """How many seeds the arms of a panel have."""
    counts = sorted({len(these) for these in arms(rows).values()})
    if counts == [1]:
        return "1 seed"
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def memorization(rows: list[Row], reference: list[Row]) -> tuple[int, dict[Arm, tuple[float, float]]]:
    """The group that is worst for the reference on the test set, and each arm's mean accuracy on it in the training set
    and in the test set, fractions.  Arms without examples of it in either are left out.

    Raises:
        ValueError: the reference has no rows, or no group with a test accuracy.
    """
    accuracies: dict[int, list[float]] = defaultdict(list)
    for row in reference:
        for g, accuracy in enumerate(row["group_acc"]):
            if accuracy is not None:
                accuracies[g].append(accuracy)
    if not accuracies:
        raise ValueError("The reference has no group with a test accuracy.")
    worst = min(accuracies, key=lambda g: mean(accuracies[g]))
    found = {}
    for name, these in arms(rows).items():
        pairs = [(row["train_group_acc"][worst], row["group_acc"][worst]) for row in these]
        known = [(train, test) for train, test in pairs if train is not None and test is not None]
        if known:
            found[name] = mean(train for train, _ in known), mean(test for _, test in known)
    return worst, found
