"""The classification head of a network in a Trainer: check that it decides, read it, write it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from demem.batch import apply_model
from demem.linear import LinearHead
from demem.run.passes import examples, undisturbed
from demem.sites import ActivationReader, Site, deciding_heads, named_layers


def model_with_head(pl_module: pl.LightningModule, head: nn.Module) -> nn.Module:
    """What to call for logits: the module itself, or, where it has no ``forward`` of its own, the part that holds the
    head.

    Raises:
        ValueError: no part of the module holds the head.
    """
    # The two Lightning packages have class trees of their own, so the module is asked by name.
    libraries = ("pytorch_lightning", "lightning", "torch")
    if any("forward" in vars(c) for c in type(pl_module).__mro__ if c.__module__.split(".")[0] not in libraries):
        return pl_module
    for child in pl_module.children():
        if any(module is head for module in child.modules()) and child is not head:
            return child
    raise ValueError(f"{type(pl_module).__name__} has no forward(self, x) that returns logits; define one.")


def check_head(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, head: nn.Linear, loader: DataLoader[Any]
) -> None:
    """Refuse a head that cannot be refitted, or that is not what decides: one of two, or a layer of another loss.

    Args:
        trainer, pl_module: of the run.
        name, head: of the layer.
        loader: whose first batch is tried.

    Raises:
        ValueError: the head has no bias, or a weight that is computed from others or shared with another layer; the
            logits of a held-out batch are not the head's (the message names the layer that gives them); or the head's
            output is not weight · x + bias.
    """
    _check_own_parameters(pl_module, name, head)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        pruned = [layer for layer, _ in getattr(callback, "_parameters_to_prune", ())]
        if any(layer is head for layer in pruned):
            raise ValueError(
                f"{type(callback).__name__} prunes the head {name!r}, whose weight is then computed from others, so it "
                "cannot be refitted. Leave the head out of parameters_to_prune."
            )
    model = model_with_head(pl_module, head)
    with undisturbed(trainer, pl_module):
        batches = [batch.x for _, batch in islice(examples(trainer, pl_module, loader), 1)]
    require_deciding(trainer, pl_module, name, head, batches)
    with undisturbed(trainer, pl_module):
        linear = all(_is_linear(model, head, x) for x in batches)
    if not trainer.strategy.reduce_boolean_decision(linear):
        raise ValueError(f"The output of the head {name!r} is not weight · x + bias, so it cannot be refitted.")


def require_deciding(
    trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, head: nn.Module, inputs: list[Any]
) -> None:
    """Refuse a head whose output is not the logits of these inputs; the message names the layer that gives them."""
    model = model_with_head(pl_module, head)
    layers = named_layers(model)
    with undisturbed(trainer, pl_module):
        found = [deciding_heads(model, x) for x in inputs]
    decides = all(any(layers[other] is head for other in others) for others in found)
    if not trainer.strategy.reduce_boolean_decision(decides):
        prefix = next((f"{n}." for n, module in named_layers(pl_module).items() if module is model), "")
        others = [prefix + other for others in found for other in others]
        hint = f"Pass head={others[0]!r}, which does." if others else "Let forward return the logits of one head."
        raise ValueError(f"The linear layer {name!r} does not give the logits. {hint}")


def _check_own_parameters(pl_module: nn.Module, name: str, head: nn.Linear) -> None:
    if head.bias is None:
        raise ValueError(f"The head {name!r} has no bias; MemorizationRemover refits weight and bias.")
    if "weight" not in head._parameters:
        raise ValueError(
            f"The weight of the head {name!r} is computed from others (pruning, weight or spectral normalisation), so "
            "it cannot be refitted. Use a plain linear layer."
        )
    own = {id(parameter) for parameter in head.parameters()}
    named = {f"{n}.{p}": q for n, layer in named_layers(pl_module).items() for p, q in layer._parameters.items()}
    named |= dict(pl_module.named_parameters(recurse=False))
    shared = [n for n, parameter in named.items() if id(parameter) in own and not n.startswith(f"{name}.")]
    others = [n for n, _ in head.named_parameters() if n not in ("weight", "bias")]
    if others:
        raise ValueError(
            f"The head {name!r} has the parameters {', '.join(others)} beside weight and bias (LoRA, for instance), so "
            "it cannot be refitted. Use a plain linear layer."
        )
    if shared:
        raise ValueError(
            f"The head {name!r} shares its parameters with {', '.join(shared)} (tied weights), so refitting it would "
            "change that layer, too. Use a head of its own."
        )


def _is_linear(model: nn.Module, head: nn.Linear, x: Any) -> bool:
    sites = [Site("input", head, "input"), Site("output", head)]
    with torch.no_grad(), ActivationReader(sites, None) as reader:
        apply_model(model, x)
        seen = reader.pop()
        error = F.linear(seen["input"], head.weight, head.bias).float() - seen["output"].float()
    return bool(error.norm() <= 0.01 * seen["output"].float().norm())


def read_head(head: nn.Module) -> LinearHead:
    """Weight and bias in float32; a single logit becomes that of class 1 beside zeros."""
    weight: Tensor = head.weight.detach().float()  # type: ignore[operator]
    bias: Tensor = head.bias.detach().float()  # type: ignore[operator]
    if len(bias) == 1:
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    return LinearHead(weight, bias)


def write_head(head: nn.Module, fitted: LinearHead) -> None:
    """Put weight and bias in the layer; the opposite of :func:`read_head`."""
    weight, bias = fitted
    if len(head.bias) == 1:  # type: ignore[arg-type]
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    with torch.no_grad():
        head.weight.copy_(weight.to(head.weight))  # type: ignore[operator, arg-type]
        head.bias.copy_(bias.to(head.bias))  # type: ignore[operator, arg-type]
