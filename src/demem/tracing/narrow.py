"""Rules of the restart: what an operation makes of a value in which only some channels changed.

A value is *narrow* if only a few known channels of it changed, and *wide* if every channel may have.  :data:`MODULES`,
:data:`FUNCTIONS` and :data:`METHODS` hold the rules by operation:

==========================================  ==============  =======================================================
operation                                   narrow becomes  computed from
==========================================  ==============  =======================================================
activations, dropout, identity              narrow          the changed channels alone
batch norm with running statistics          narrow          the changed channels alone, with their scale and shift
max, average and adaptive pools of maps     narrow          the changed channels alone
mean over a map, flattening of 1×1 maps     narrow          the changed channels alone
sum of two values of the same shape         narrow          the changed channels and the same ones of the other value;
                                                            both may be narrow if the same channels changed
depthwise convolution                       narrow          the changed channels and their filters
convolution of one group, linear layer      wide            the kept output plus the effect of the change
any other operation or layer with hooks     wide            the operation itself, run on all rows
==========================================  ==============  =======================================================

A rule returns ``None`` where it does not apply (other axes, groups, padding modes or arguments); the value is then
widened and the operation run like any other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


class CannotRestart(Exception):
    """The model cannot be traced or uses something that the restart does not understand; run it whole instead."""


class Narrow(NamedTuple):
    """Rows in which only some channels differ from what was kept.

    Attributes:
        value: ``(R, ...)`` shaped like the kept value, with the channel axis as long as ``channels``.
        channels: ``(R, k)`` indices of these channels.
        axis: the channel axis, negative.
    """

    value: Tensor
    channels: Tensor
    axis: int


class Rows(NamedTuple):
    """One row per example and ablated unit.

    Attributes:
        unit: ``(R,)`` number of the ablated unit within this call, sorted.
        example: ``(R,)`` position of the example in the batch.
    """

    unit: Tensor
    example: Tensor


class Step(NamedTuple):
    """One operation whose first input is narrow, while nothing else that it reads has changed.

    Attributes:
        node: the operation.
        layer: its module, ``None`` for functions and methods.
        narrow: the changed input.
        base: that input as it was kept, ``(B, ...)``.
        kept: the operation's result as it was kept, ``(B, ...)``.
        rows: of ``narrow``.
    """

    node: fx.Node
    layer: Any
    narrow: Narrow
    base: Tensor
    kept: Tensor
    rows: Rows

    def change(self) -> Tensor:
        """The changed channels minus what they were, shaped like ``narrow.value``."""
        return self.narrow.value - channels_of(self.base, self.narrow, self.rows.example)

    def is_map(self) -> bool:
        """Whether the input is ``(B, C, H, W)`` with the changed channels in C."""
        return self.base.ndim == 4 and self.narrow.axis == -3


Rule = Callable[[Step], "Narrow | Tensor | None"]


def channels_of(base: Tensor, narrow: Narrow, example: Tensor) -> Tensor:
    """The kept values of the changed channels, shaped like ``narrow.value``."""
    channels_second = base.movedim(narrow.axis, 1)
    picked = channels_second[example[:, None], narrow.channels]
    return picked.movedim(1, narrow.axis)


def widen(base: Tensor, narrow: Narrow, example: Tensor) -> Tensor:
    """All channels of every row, ``(R, ...)``: the kept ones with the changed ones written over them."""
    wide = base[example]
    index = narrow.channels.view(len(wide), *[1] * (wide.ndim - 1 + narrow.axis), -1, *[1] * (-1 - narrow.axis))
    return wide.scatter_(wide.ndim + narrow.axis, index.expand_as(narrow.value), narrow.value.to(wide.dtype))


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


# -- rules ----------------------------------------------------------------------------------------------------------


def _elementwise_layer(step: Step) -> Narrow:
    value = step.narrow.value
    return step.narrow._replace(value=step.layer(value.clone() if getattr(step.layer, "inplace", False) else value))


def _elementwise_function(step: Step) -> Narrow | None:
    extra = {k: v for k, v in step.node.kwargs.items() if k != "inplace"}
    if any(isinstance(a, fx.Node) for a in (*step.node.args[1:], *extra.values())):
        return None
    return step.narrow._replace(value=step.node.target(step.narrow.value, *step.node.args[1:], **extra))  # type: ignore


def _elementwise_method(step: Step) -> Narrow | None:
    if step.node.args[1:] or step.node.kwargs:
        return None
    return step.narrow._replace(value=getattr(step.narrow.value.clone(), str(step.node.target))())


def _batch_norm(step: Step) -> Narrow | None:
    """y = (x − μ) / √(σ² + ε) · γ + β = scale · x + shift with the numbers of each channel."""
    module, narrow = step.layer, step.narrow
    mean, var = module.running_mean, module.running_var
    if var is None or narrow.axis != 1 - step.base.ndim:
        return None
    if mean is None:
        raise CannotRestart("A batch norm without running statistics mixes examples.")
    scale = torch.rsqrt(var + module.eps)
    if module.weight is not None:
        scale = scale * module.weight
    shift = -mean * scale
    if module.bias is not None:
        shift = shift + module.bias
    tail = [1] * (narrow.value.ndim - 2)
    k = narrow.channels.shape[1]
    value = narrow.value * scale[narrow.channels].view(-1, k, *tail) + shift[narrow.channels].view(-1, k, *tail)
    return narrow._replace(value=value)


def _pool(step: Step) -> Narrow | None:
    return step.narrow._replace(value=step.layer(step.narrow.value)) if step.is_map() else None


def _mean_of_map(step: Step) -> Narrow | None:
    over_map = step.node.args[1:] in (((2, 3),), ([2, 3],), ((-2, -1),), ([-2, -1],)) and not step.node.kwargs
    if not step.is_map() or not over_map:
        return None
    return Narrow(step.narrow.value.mean((2, 3)), step.narrow.channels, -1)


def _flatten_layer(step: Step) -> Narrow | None:
    return _flatten(step) if step.layer.start_dim == 1 and step.layer.end_dim == -1 else None


def _flatten_call(step: Step) -> Narrow | None:
    return _flatten(step) if step.node.args[1:] in ((1,), (1, -1)) and not step.node.kwargs else None


def _flatten(step: Step) -> Narrow | None:
    """Channels stay channels if every one has a single position."""
    narrow, base = step.narrow, step.base
    if base.ndim < 3:
        return narrow if base.ndim == 2 else None
    if narrow.axis == 1 - base.ndim and base[0, 0].numel() == 1:
        return Narrow(narrow.value.flatten(1), narrow.channels, -1)
    return None


def _linear(step: Step) -> Tensor | None:
    """W(x + Δ) = W x + W[:, c] Δ_c for changed inputs c: ``(R, ..., O)`` from the kept W x."""
    if step.narrow.axis != -1:
        return None
    change, weight, channels = step.change(), step.layer.weight, step.narrow.channels
    out = step.kept.index_select(0, step.rows.example).contiguous()
    for start, end in _rows_of_units(step.rows):  # the same channels changed in all rows of a unit
        columns = weight[:, channels[start]]
        out[start:end] += change[start:end].to(out.dtype) @ columns.t().to(out.dtype)
    return out


def _conv(step: Step) -> Narrow | Tensor | None:
    module, narrow = step.layer, step.narrow
    if not step.is_map() or module.padding_mode != "zeros":
        return None
    if isinstance(module.padding, str) or narrow.channels.shape[1] != 1:
        return None
    if module.groups == module.in_channels == module.out_channels and module.groups > 1:
        return _depthwise(step)
    return _spread(step) if module.groups == 1 else None


def _depthwise(step: Step) -> Narrow:
    """Each channel has a filter of its own: one convolution whose groups are the rows."""
    module, narrow = step.layer, step.narrow
    weight = module.weight[narrow.channels[:, 0]]
    value = narrow.value.transpose(0, 1)  # (R, 1, H, W) → (1, R, H, W)
    value = F.conv2d(value, weight, None, module.stride, module.padding, module.dilation, len(weight))
    value = value.transpose(0, 1)
    if module.bias is not None:
        value = value + module.bias[narrow.channels][:, :, None, None]
    return narrow._replace(value=value)


def _spread(step: Step) -> Tensor:
    """W * (x + Δ) = W * x + W[:, c] * Δ_c for one changed channel c; ``(R, O, H, W)``, channels last in memory."""
    module, channels, kept, rows = step.layer, step.narrow.channels[:, 0], step.kept, step.rows
    taps = F.unfold(step.change(), module.kernel_size, module.dilation, module.padding, module.stride)
    taps = taps.transpose(1, 2)  # (R, positions, kernel)
    height, width = kept.shape[2:]
    out = kept.permute(0, 2, 3, 1).reshape(len(kept), height * width, -1).index_select(0, rows.example)
    out = out.contiguous()  # (R, positions, O)
    taps, weight = taps.to(out.dtype), module.weight.flatten(2).to(out.dtype)
    for start, end in _rows_of_units(rows):
        block = out[start:end].flatten(0, 1)
        block.addmm_(taps[start:end].flatten(0, 1), weight[:, int(channels[start])].t())
    return out.view(len(out), height, width, -1).permute(0, 3, 1, 2)


def _rows_of_units(rows: Rows) -> list[tuple[int, int]]:
    """Start and end of the rows of each unit that has any."""
    counts = torch.unique_consecutive(rows.unit, return_counts=True)[1].tolist()
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


def add(a: Narrow | None, b: Narrow | None, kept: tuple[Any, Any], rows: Rows) -> Narrow | None:
    """Rule of the sum ``a + b``, where ``None`` is an unchanged value; ``kept`` holds both as they were."""
    if not isinstance(kept[0], Tensor) or not isinstance(kept[1], Tensor) or kept[0].shape != kept[1].shape:
        return None
    if a is not None and b is not None:
        same = a is b or (
            a.axis == b.axis and a.channels.shape == b.channels.shape and bool((a.channels == b.channels).all())
        )
        return a._replace(value=a.value + b.value) if same else None
    if a is not None:
        return a._replace(value=a.value + channels_of(kept[1], a, rows.example))
    return b and b._replace(value=b.value + channels_of(kept[0], b, rows.example))


_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Tanh,
    nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
_ACTIVATION_FUNCTIONS = (
    torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.elu, F.leaky_relu, F.mish,
)  # fmt: skip

ADDS: set[Any] = {operator.add, operator.iadd, torch.add}
"""Functions of two values that follow :func:`add`."""

MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(_ACTIVATIONS, _elementwise_layer),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), _pool),
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.Flatten: _flatten_layer,
}
"""Rules of layers, by their exact type: a subclass may compute something else."""

FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys(_ACTIVATION_FUNCTIONS, _elementwise_function),
    torch.flatten: _flatten_call,
}
"""Rules of functions of one tensor."""

METHODS: dict[str, Rule] = {
    **dict.fromkeys(("relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "float"), _elementwise_method),
    "flatten": _flatten_call,
    "mean": _mean_of_map,
}
"""Rules of tensor methods."""


def rule_of(node: fx.Node, layer: nn.Module | None) -> Rule | None:
    """Look up the rule of an operation on one tensor; ``None`` if it has none and is run on all rows."""
    if node.op == "call_module" and layer is not None:
        return None if has_hooks(layer) else MODULES.get(type(layer))
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    return METHODS.get(str(node.target)) if node.op == "call_method" else None


def is_activation(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether an operation may hide the change of a channel, as a ReLU does that of a negative one."""
    if node.op == "call_module":
        return type(layer) in _ACTIVATIONS
    return node.target in _ACTIVATION_FUNCTIONS or node.target in ("relu", "relu_")
