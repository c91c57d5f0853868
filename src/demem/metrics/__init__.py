"""Worst-group, per-group, average and adjusted average accuracy: functions first, torchmetrics classes on top."""

from demem.metrics.functional import (
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
    WorstGroupAccuracy,
)

__all__ = [
    "AdjustedAverageAccuracy",
    "AverageAccuracy",
    "GroupAccuracy",
    "WorstGroupAccuracy",
    "adjusted_average_accuracy_compute",
    "average_accuracy_compute",
    "group_accuracy_compute",
    "group_accuracy_update",
    "worst_group_accuracy",
    "worst_group_accuracy_compute",
]
