"""Worst-group, per-group, average and adjusted average accuracy: functions first, torchmetrics classes on top."""

from demem.metrics.collection import AccuracyReport, require_groups, without_update_warning
from demem.metrics.functional import (
    MAX_GROUPS,
    adjusted_average_accuracy_compute,
    average_accuracy_compute,
    group_accuracy_compute,
    group_accuracy_update,
    worst_group_accuracy,
    worst_group_accuracy_compute,
)
from demem.metrics.group_accuracy import (
    AdjustedAverageAccuracy,
    AverageAccuracy,
    GroupAccuracy,
    GroupSizes,
    WorstGroupAccuracy,
)

__all__ = [
    "MAX_GROUPS",
    "AccuracyReport",
    "AdjustedAverageAccuracy",
    "AverageAccuracy",
    "GroupAccuracy",
    "GroupSizes",
    "WorstGroupAccuracy",
    "adjusted_average_accuracy_compute",
    "average_accuracy_compute",
    "group_accuracy_compute",
    "group_accuracy_update",
    "require_groups",
    "without_update_warning",
    "worst_group_accuracy",
    "worst_group_accuracy_compute",
]
