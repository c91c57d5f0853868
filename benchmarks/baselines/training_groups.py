"""With the training groups: group reweighting, and GroupDRO (Sagawa et al. 2020). Epoch by worst group on validation.

Group reweighting draws every group equally often.  GroupDRO does too (the authors' ``reweight_groups``) and
minimises Σ_g q_g L_g, where after each batch q_g grows by exp(η L_g), η = .01, and is scaled to sum to 1.

Both are tuned over learning rate and weight decay, as the authors of GroupDRO found that it needs a strong decay: the
data set's own rate with decays up to 1, and three pairs of the range that the authors use to fine-tune, up to a decay
of 1 at a rate of 1e-5.  The pair is chosen with the epoch, on the first seed.  On ``none`` held-out groups choose, and
train nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.keep_best import KeepBest, fit_best, fit_tuned
from benchmarks.experiment import HELD_OUT, Experiment, Method, Outcome, Run
from demem.batch import Batch
from demem.data import GroupedDataModule

STEP = 0.01
GRID: tuple[dict[str, Any], ...] = (
    {},  # the data set's own learning rate and weight decay
    {"weight_decay": 1e-2},
    {"weight_decay": 0.1},
    {"weight_decay": 1.0},
    {"lr": 1e-3, "weight_decay": 1e-4},
    {"lr": 1e-4, "weight_decay": 0.1},
    {"lr": 1e-5, "weight_decay": 1.0},
)


class GroupDROLoss:
    """The loss of a batch, and the group weights ``q`` ``(G,)`` that it moves."""

    def __init__(self, num_groups: int, step: float = STEP) -> None:
        self.q = torch.full((num_groups,), 1.0 / num_groups)
        self.step = step

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        group = batch.group
        if group is None:
            raise ValueError("GroupDRO needs groups in the training batches.")
        losses = F.cross_entropy(logits, batch.y, reduction="none")
        counts = torch.bincount(group, minlength=len(self.q))
        means = torch.zeros(len(self.q), device=losses.device).index_add(0, group, losses) / counts.clamp(min=1)
        q = self.q.to(losses.device) * torch.exp(self.step * means.detach())
        q = q / q.sum()
        self.q = q.cpu()
        return (q * means).sum()


def fit_group_dro(
    experiment: Experiment, arm: str, data: Callable[[], GroupedDataModule], num_groups: int | None = None
) -> Outcome:
    """GroupDRO over the grid, with the groups of the training and validation sets that ``data`` makes.

    Args:
        experiment: of the row.
        arm: its name, for what is chosen on the first seed.
        data: makes a fresh data module with group-balanced sampling.
        num_groups: of its training set; default those of the data module.
    """

    def fit(point: dict[str, Any]) -> tuple[Run, KeepBest]:
        rows, module = data(), experiment.module(**point)
        module.loss = GroupDROLoss(num_groups or rows.num_groups)  # type: ignore[method-assign]
        return fit_best(experiment, "val/worst_group_acc", data=rows, module=module)

    run, best, tuned = fit_tuned(experiment, arm, GRID, fit)
    return Outcome(run.logits, {"tuned": tuned, "step": STEP, "epoch": best.epoch})


def group_dro(experiment: Experiment) -> Outcome:
    return fit_group_dro(experiment, "group_dro", lambda: experiment.data(sampling="group_balanced"))


def group_weights(experiment: Experiment) -> Outcome:
    def fit(point: dict[str, Any]) -> tuple[Run, KeepBest]:
        data = experiment.data(sampling="group_balanced")
        return fit_best(experiment, "val/worst_group_acc", data=data, module=experiment.module(**point))

    run, best, tuned = fit_tuned(experiment, "group_weights", GRID, fit)
    return Outcome(run.logits, {"tuned": tuned, "sampling": "group_balanced", "epoch": best.epoch})


_RULE = "learning rate, weight decay and epoch by worst group on validation"
_GRID = "; ".join(", ".join(f"{k} {v:g}" for k, v in point.items()) or "own" for point in GRID)
METHODS = [
    Method("group_weights", "T3", _RULE, group_weights, HELD_OUT, grid=_GRID),
    Method("group_dro", "T3", _RULE, group_dro, HELD_OUT, grid=_GRID),
]
