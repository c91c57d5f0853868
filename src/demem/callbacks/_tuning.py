"""Fine-tune the whole network on a balanced subset of the held-out examples, when training is over."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from demem.batch import Batch, apply_model
from demem.callbacks._passes import batches_of, undisturbed

RISE = 0.01  # nats: where the head is the best already, the loss stays as it is, more or less


def fine_tune(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    model: nn.Module,
    loader: DataLoader[Any],
    positions: Tensor,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> bool:
    """Minimise cross-entropy on a few examples by Adam, whose learning rate falls from ``lr`` to 0 by a cosine.

    Weights that the trainer's optimizers (if it has any) do not hold stay as they are.  The step is Adam's own, not the
    trainer's: with frozen statistics, in evaluation mode, a learning rate that suits batch norm in training tears a
    network apart, and Adam's steps have the same size whatever the scale of the loss.  Batch-norm statistics, the
    random state and the trainer's optimizers stay as they are; dropout is off.  Every process does the same steps; the
    weights of the first one count.  Should the loss on the first batch be higher afterwards (by .01 nats or more),
    or not finite, the weights are put back and a warning tells so.

    Args:
        trainer, pl_module: of the run.
        model: gives the logits.
        loader: whose data set the examples are in (:func:`demem.callbacks._passes.has_positions`).
        positions: of the examples in that data set.
        epochs: passes over them.
        lr: the first learning rate.
        batch_size: examples a step.
        seed: of their order.

    Returns:
        Whether the weights are the new ones.
    """
    trained = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    # A module that steps by itself may hide its optimizer.
    parameters = [p for p in pl_module.parameters() if p.requires_grad and (id(p) in trained or not trained)]
    before = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(seed)

    def loss_on(batch: Batch) -> Tensor:
        return F.cross_entropy(apply_model(model, batch.x).float(), batch.y)

    with undisturbed(trainer, pl_module, grad=True), _full_precision_for_fp16(trainer):
        optimizer = torch.optim.Adam(parameters, lr)
        steps = epochs * math.ceil(len(positions) / batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        orders = [positions[torch.randperm(len(positions), generator=generator)] for _ in range(epochs)]
        first = next(batches_of(trainer, pl_module, loader, orders[0], batch_size))
        with torch.no_grad():
            at_first = float(loss_on(first))
        for batch in (b for order in orders for b in batches_of(trainer, pl_module, loader, order, batch_size)):
            optimizer.zero_grad()
            loss_on(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            at_last = float(loss_on(first))
    if not trainer.strategy.reduce_boolean_decision(at_last < at_first + RISE):  # the same for all processes
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        warnings.warn(
            f"Fine-tuning on held-out examples took their loss from {at_first:.3g} to {at_last:.3g}, so the weights "
            "are those before it. A lower fine_tune_lr may help; fine_tune=0 leaves it out.",
            stacklevel=2,
        )
        return False
    if trainer.world_size > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)
    return True


def _full_precision_for_fp16(trainer: pl.Trainer) -> torch.autocast:
    # Half-precision gradients need the trainer's loss scaling; bfloat16 and float32 ones do not.
    kind = trainer.strategy.root_device.type
    return torch.autocast(kind, enabled=trainer.precision == "bf16-mixed", dtype=torch.bfloat16)
