"""The classification head of a network in a Trainer: check that it decides, read it, write it."""

from __future__ import annotations

from itertools import islice

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from demem.callbacks._passes import examples, held_out_loader, network, undisturbed
from demem.linear import LinearHead
from demem.sites import named_layers
from demem.sites.read import deciding_heads


def check_head(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, head: nn.Linear) -> None:
    """What is refitted must be what decides: one of two heads, or a layer that serves another loss, must not be taken.

    Raises:
        ValueError: the logits of a held-out batch are not the head's; the message names the layer that gives them.
    """
    model, loader = network(pl_module, head), held_out_loader(trainer)
    with undisturbed(trainer, pl_module):
        found = [deciding_heads(model, batch.x) for _, batch in islice(examples(trainer, pl_module, loader), 1)]
    layers = named_layers(model)
    decides = all(any(layers[other] is head for other in others) for others in found)
    if not trainer.strategy.reduce_boolean_decision(decides):
        prefix = next((f"{n}." for n, module in named_layers(pl_module).items() if module is model), "")
        others = [prefix + other for others in found for other in others]
        hint = f"Pass head={others[0]!r}, which does." if others else "Let forward return the logits of one head."
        raise ValueError(f"The linear layer {name!r} does not give the logits. {hint}")


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
