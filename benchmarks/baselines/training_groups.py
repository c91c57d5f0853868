"""With the training groups: group reweighting, and GroupDRO (Sagawa et al. 2020). Epoch by worst group on validation.

Group reweighting draws every group equally often.  GroupDRO does too (the authors' ``reweight_groups``) and
minimises Σ_g q_g L_g, where after each batch q_g grows by exp(η L_g), η = .01, and is scaled to sum to 1; weight
decay is tuned, as its authors found that it needs a strong one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.keep_best import KeepBest, fit_best
from benchmarks.experiment import Experiment, Method, Outcome, Run
from demem.batch import Batch

STEP = 0.01
WEIGHT_DECAY = (1e-4, 1e-2)


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


def group_weights(experiment: Experiment) -> Outcome:
    data = experiment.data(sampling="group_balanced")
    run, best = fit_best(experiment, "val/worst_group_acc", data=data)
    return Outcome(run.logits, {"sampling": "group_balanced", "epoch": best.epoch})


def group_dro(experiment: Experiment) -> Outcome:
    runs: dict[float, tuple[Run, KeepBest]] = {}

    def train(weight_decay: float) -> tuple[Run, KeepBest]:
        if weight_decay not in runs:
            data = experiment.data(sampling="group_balanced")
            module = experiment.module(weight_decay=weight_decay)
            module.loss = GroupDROLoss(data.num_groups)  # type: ignore[method-assign]
            runs[weight_decay] = fit_best(experiment, "val/worst_group_acc", data=data, module=module)
        return runs[weight_decay]

    def choose() -> dict[str, Any]:
        return {"weight_decay": max(WEIGHT_DECAY, key=lambda wd: train(wd)[1].best)}

    tuned = experiment.choose("group_dro", choose)
    run, best = train(tuned["weight_decay"])
    return Outcome(run.logits, {"tuned": tuned, "step": STEP, "epoch": best.epoch})


METHODS = [
    Method("group_weights", "T3", "epoch by worst group on validation", group_weights),
    Method(
        "group_dro",
        "T3",
        "epoch and weight decay by worst group on validation",
        group_dro,
        grid=f"weight decay {WEIGHT_DECAY}",
    ),
]
