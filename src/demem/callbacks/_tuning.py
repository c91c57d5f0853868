"""Fine-tune the whole network on a balanced subset of the held-out examples, when training is over."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from demem.batch import apply_model
from demem.callbacks._passes import batches_of, has_positions, undisturbed

LR_SHARE = 1 / 3  # of the learning rate that training began with


def can_fine_tune(trainer: pl.Trainer, loader: DataLoader[Any]) -> bool:
    """Whether the loader's examples can be read by position and the optimizers take plain steps."""
    return has_positions(loader) and not any(isinstance(o, torch.optim.LBFGS) for o in trainer.optimizers)


def fine_tune(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    model: nn.Module,
    loader: DataLoader[Any],
    positions: Tensor,
    epochs: int,
    batch_size: int,
    seed: int,
) -> None:
    """Minimise cross-entropy on a few examples with the trainer's own optimizers.

    The learning rate falls from a third of the one that training began with to zero, by a cosine.  Modules are in
    evaluation mode: batch-norm statistics and the random state stay, dropout is off.  The optimizers are left as they
    were.  Every process does the same steps; the weights of the first one count.  Should the loss not be finite, all
    weights are put back and a warning tells so.

    Args:
        trainer, pl_module: of the run.
        model: gives the logits.
        loader: whose data set the examples are in.
        positions: of the examples in that data set.
        epochs: passes over them.
        batch_size: examples a step.
        seed: of their order.
    """
    parameters = list(pl_module.parameters())
    before = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(positions) / batch_size)
    step = 0
    with undisturbed(trainer, pl_module, grad=True), _borrowed(trainer.optimizers) as rates, _no_fp16(trainer):
        for _ in range(epochs):
            order = positions[torch.randperm(len(positions), generator=generator)]
            for batch in batches_of(trainer, pl_module, loader, order, batch_size):
                _set_rates(trainer.optimizers, rates, 0.5 * (1 + math.cos(math.pi * step / steps)))
                loss = F.cross_entropy(apply_model(model, batch.x).float(), batch.y)
                if not bool(loss.isfinite()):
                    _put(parameters, before)
                    warnings.warn(
                        "Fine-tuning on held-out examples gave a loss that is not finite; the weights are those before "
                        "it. fine_tune=0 leaves it out.",
                        stacklevel=2,
                    )
                    return
                for optimizer in trainer.optimizers:
                    optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                for optimizer in trainer.optimizers:
                    optimizer.step()
                step += 1
    if trainer.world_size > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)


@contextmanager
def _borrowed(optimizers: list[Optimizer]) -> Iterator[list[list[float]]]:
    """Optimizers without momentum; yields the learning rate that each parameter group began with."""
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    try:
        for optimizer in optimizers:
            optimizer.state.clear()
        # Schedulers note where they began; by now the rate itself may have fallen to zero.
        yield [[g.get("max_lr", g.get("initial_lr", g["lr"])) for g in o.param_groups] for o in optimizers]
    finally:
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.zero_grad()
            optimizer.load_state_dict(state)


def _set_rates(optimizers: list[Optimizer], rates: list[list[float]], factor: float) -> None:
    for optimizer, began in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, began, strict=True):
            group["lr"] = rate * LR_SHARE * factor


def _no_fp16(trainer: pl.Trainer) -> torch.autocast:
    # Half-precision gradients need the trainer's loss scaling; bfloat16 and float32 ones do not.
    kind = trainer.strategy.root_device.type
    return torch.autocast(kind, enabled=trainer.precision == "bf16-mixed", dtype=torch.bfloat16)


def _put(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
