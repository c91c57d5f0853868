"""Gate units by multiplying them with a buffer, and fold the gates into plain weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from demem.sites.find import Site, edit_call, first_tensor, own_weight, replace_first_tensor, unit_axis

_BUFFER = {"output": "output_gate", "input": "input_gate"}
_BAKEABLE_OUTPUT = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
_BAKEABLE_INPUT = (nn.modules.conv._ConvNd, nn.Linear)


class Gates:
    """Multiplicative gates, one number per unit, kept as non-persistent buffers on the gated layers.

    A gate of ones leaves every value as it is, bit for bit.  Gates are written in place, so that a compiled model and
    DistributedDataParallel both use the new values.  They are not part of the model's ``state_dict`` (a checkpoint
    loads without demem); save :meth:`state_dict` of this object instead.

    Args:
        sites: outputs of convolutions, linear layers, batch and layer norms, or inputs of convolutions and linear
            layers: gates there can be folded into weights.

    Raises:
        ValueError: gates at a site cannot be folded into weights.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> gates = Gates(find_sites(model, "2:input"))
        >>> gates["2:input"] = torch.tensor([1.0, 0.0, 1.0])  # mask the middle one of three units
        >>> gates["2:input"]
        tensor([1., 0., 1.])
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(bake_gates(model)(x), model(x), atol=1e-6)
        True
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        for site in self.sites:
            allowed = _BAKEABLE_OUTPUT if site.side == "output" else _BAKEABLE_INPUT
            units = site.require_num_units()
            if not isinstance(site.module, allowed):
                raise ValueError(
                    f"The {site.side} of {site.name!r} ({type(site.module).__name__}) cannot be gated, because gates "
                    "there cannot be folded into weights. Name a convolution, linear, batch- or layer-norm layer, or "
                    "the input of a convolution or linear layer."
                )
            weight = own_weight(site)  # what the gate will be folded into
            name = _BUFFER[site.side]
            if name not in site.module._buffers:
                gate = torch.ones(units * site.channels_per_unit, device=weight.device)
                site.module.register_buffer(name, gate, persistent=False)
                site.register(_HOOK[site.side])
        _forget_compiled()

    def __getitem__(self, site_name: str) -> Tensor:
        """Return a copy of a site's gate ``(N,)``."""
        site = self._site(site_name)
        return self._buffer(site).view(-1, site.channels_per_unit)[:, 0].clone()

    def __setitem__(self, site_name: str, values: Tensor) -> None:
        """Write a site's gate ``(N,)`` in place; its values must be finite."""
        site = self._site(site_name)
        if values.shape != (site.require_num_units(),) or not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"The gate of site {site_name!r} takes {site.num_units} finite numbers, got {tuple(values.shape)}."
            )
        buffer = self._buffer(site)
        with torch.no_grad():
            buffer.copy_(values.to(buffer).repeat_interleave(site.channels_per_unit))

    def __iter__(self) -> Any:
        return iter(site.name for site in self.sites)

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``{site name: gate (N,)}`` on the CPU."""
        return {site.name: self[site.name].cpu() for site in self.sites}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Write the values saved by :meth:`state_dict`.

        Raises:
            ValueError: the sites or their sizes differ.
        """
        names = [site.name for site in self.sites]
        if sorted(state) != sorted(names):
            raise ValueError(f"The saved gates belong to the sites {sorted(state)}, this model has {sorted(names)}.")
        for name, values in state.items():
            self[name] = values

    def buffers(self) -> list[Tensor]:
        """Return the buffers themselves in the order of the sites, to broadcast them after a change."""
        return [self._buffer(site) for site in self.sites]

    def _buffer(self, site: Site) -> Tensor:
        return site.module.get_buffer(_BUFFER[site.side])

    def _site(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"No gated site is called {name!r}; there are {[s.name for s in self.sites]}.")


def bake_gates(model: nn.Module) -> nn.Module:
    r"""Copy ``model`` with every gate folded into the weights and removed.

    The copy is an ordinary module: no hooks or buffers of this package, the same ``state_dict`` keys, and the same
    outputs up to rounding.  With gates :math:`g` at the outputs and :math:`h` at the inputs of a layer,

    .. math:: g \odot (W (h \odot x) + b) = (\operatorname{diag}(g)\, W \operatorname{diag}(h))\, x + g \odot b

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> Gates(find_sites(model, "0"))["0"] = torch.tensor([1.0, 0.0, 2.0])
        >>> baked = bake_gates(model)
        >>> torch.equal(baked[0].weight, model[0].weight * torch.tensor([[1.0], [0.0], [2.0]]))
        True
    """
    baked = copy.deepcopy(model)
    for module in baked.modules():
        for side, scale in (("output", _scale_outputs), ("input", _scale_inputs)):
            gate = _remove_gate(module, side)
            if gate is not None:
                scale(module, gate)
    return baked


def remove_gates(gates: Gates) -> None:
    """Remove the hooks and buffers from the model, which then computes what it did without gates.

    Example:
        >>> from demem.sites import find_sites
        >>> model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
        >>> before, gates = model(x), Gates(find_sites(model, "0"))
        >>> gates["0"] = torch.zeros(3)
        >>> remove_gates(gates)
        >>> torch.equal(model(x), before)
        True
    """
    for site in gates.sites:
        _remove_gate(site.module, site.side)
    _forget_compiled()


def _forget_compiled() -> None:
    """Drop what ``torch.compile`` has compiled: it does not notice new hooks and would run the code of before."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _gate_output(module: nn.Module, args: Any, output: Any) -> Any:
    return _multiply(module, output, "output")


def _gate_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return edit_call(module, args, kwargs, partial(_multiply, module, side="input"))


# Functions of this module, not closures: a copied or pickled model keeps them, and they are found again by identity.
_HOOK: dict[str, Callable[..., Any]] = {"output": _gate_output, "input": _gate_input}


def _multiply(module: nn.Module, value: Any, side: str) -> Any:
    x = first_tensor(value)
    axis = unit_axis(module, x)
    gate = module._buffers[_BUFFER[side]]
    assert gate is not None  # it is registered together with this hook
    return replace_first_tensor(value, x * gate.to(x.dtype).view(-1, *[1] * (-1 - axis)))


def _scale_outputs(module: nn.Module, gate: Tensor) -> None:
    """Multiply weight and bias by the gate ``(C_out,)`` along the axis of the outputs."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # The weight is (C_in, C_out / groups, *kernel): row i belongs to group i // (C_in / groups).
        out, groups = module.out_channels, module.groups
        per_group = gate.view(groups, out // groups).repeat_interleave(weight.shape[0] // groups, 0)
        scaled = weight * per_group.view(*weight.shape[:2], *[1] * (weight.ndim - 2))
    elif isinstance(module, nn.LayerNorm):
        scaled = weight * gate  # units are the last of the normalised axes
    else:
        scaled = weight * gate.view(-1, *[1] * (weight.ndim - 1))
    # New parameters, because a tensor that is tied to another layer must keep its value there.
    module.weight = nn.Parameter(scaled.detach().to(weight.dtype), weight.requires_grad)
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is not None:
        module.bias = nn.Parameter((bias * gate).detach().to(bias.dtype), bias.requires_grad)


def _scale_inputs(module: nn.Module, gate: Tensor) -> None:
    """Multiply the weight by the gate ``(C_in,)`` along the axis of the inputs."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        scaled = weight * gate.view(-1, *[1] * (weight.ndim - 1))
    else:
        # The weight is (C_out, C_in / groups, *kernel): row o reads the inputs of group o // (C_out / groups).
        groups = getattr(module, "groups", 1)
        per_group = gate.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        scaled = weight * per_group.view(*weight.shape[:2], *[1] * (weight.ndim - 2))
    module.weight = nn.Parameter(scaled.detach().to(weight.dtype), weight.requires_grad)


def _remove_gate(module: nn.Module, side: str) -> Tensor | None:
    """Take buffer and hook off one side of a module; returns the gate, or ``None`` if there is none."""
    gate = module._buffers.pop(_BUFFER[side], None)
    module._non_persistent_buffers_set.discard(_BUFFER[side])
    hooks: dict[int, Any] = module._forward_hooks if side == "output" else module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _HOOK[side]]:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    return gate
