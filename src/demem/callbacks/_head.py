"""The classification head of a network in a Trainer: check that it decides, read it, write it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demem.batch import apply_model
from demem.callbacks._passes import examples, held_out_loader, network, undisturbed
from demem.linear import LinearHead
from demem.sites import ActivationReader, Site, deciding_heads, named_layers


def check_head(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, head: nn.Linear) -> None:
    """What is refitted must be what decides: one of two heads, or a layer that serves another loss, must not be taken.

    Raises:
        ValueError: the logits of a held-out batch are not the head's (the message names the layer that gives them), or
            the head is no plain linear layer.
    """
    model, loader = network(pl_module, head), held_out_loader(trainer)
    layers = named_layers(model)
    with undisturbed(trainer, pl_module):
        batches = [batch.x for _, batch in islice(examples(trainer, pl_module, loader), 1)]
        found = [deciding_heads(model, x) for x in batches]
        decides = all(any(layers[other] is head for other in others) for others in found)
        linear = not decides or all(_is_linear(model, head, x) for x in batches)
    if not trainer.strategy.reduce_boolean_decision(decides):
        prefix = next((f"{n}." for n, module in named_layers(pl_module).items() if module is model), "")
        others = [prefix + other for others in found for other in others]
        hint = f"Pass head={others[0]!r}, which does." if others else "Let forward return the logits of one head."
        raise ValueError(f"The linear layer {name!r} does not give the logits. {hint}")
    if not trainer.strategy.reduce_boolean_decision(linear):
        raise ValueError(f"What the head {name!r} gives is not weight · x + bias, so that it cannot be refitted.")


def _is_linear(model: nn.Module, head: nn.Linear, x: Any) -> bool:
    sites = [Site("input", head, "input"), Site("output", head)]
    with torch.no_grad(), ActivationReader(sites, None) as reader:
        apply_model(model, x)
        seen = reader.pop()
        error = F.linear(seen["input"], head.weight, head.bias).float() - seen["output"].float()
    return bool(error.norm() <= 0.01 * seen["output"].float().norm())


def read_head(head: nn.Module) -> LinearHead:
    """Weight and bias, in float32; of a single logit, those of class 1 beside zeros."""
    weight: Tensor = head.weight.detach().float()  # type: ignore[operator]
    bias: Tensor = head.bias.detach().float()  # type: ignore[operator]
    if len(bias) == 1:  # a single logit, of class 1
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    return LinearHead(weight, bias)


def write_head(head: nn.Module, fitted: LinearHead) -> None:
    """The opposite of :func:`read_head`."""
    weight, bias = fitted
    if len(head.bias) == 1:  # type: ignore[arg-type]
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    with torch.no_grad():
        head.weight.copy_(weight.to(head.weight))  # type: ignore[operator, arg-type]
        head.bias.copy_(bias.to(head.bias))  # type: ignore[operator, arg-type]
