"""Run the rest of a network again from one of its layers, for many ablated units at once.

The model is traced once with ``torch.fx``.  For a batch, every intermediate value is kept.  Ablating a unit changes one
channel of one of them, so from there on a value is in one of three states:

* *unchanged*: it does not depend on the site and is read from what was kept;
* *narrow*: only some channels of each row changed (through batch norm, activations, pooling, residual sums, depthwise
  convolutions), and only those are computed;
* *wide*: everything may have changed, and it is computed for all rows.

A convolution or linear layer turns narrow into wide, and being linear it needs only the changed channels to do so:
:math:`W(x + \\Delta) = W x + W_{:,c}\\,\\Delta_c`.  A *row* is one example under one ablated unit; rows that the
ablation does not change at all (a dead unit) are dropped on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from demem.batch import as_logits
from demem.sites import Site
from demem.tracing.winograd import Conv3x3


class CannotRestart(Exception):
    """The model cannot be traced or uses something that the restart does not understand; run it whole instead."""


class Narrow(NamedTuple):
    """Rows in which only some channels differ from what was kept.

    Attributes:
        value: ``(R, ...)`` shaped like the kept value, with the channel axis as long as ``channels``.
        channels: ``(R, k)`` which channels these are.
        axis: the channel axis, negative.
    """

    value: Tensor
    channels: Tensor
    axis: int


class Rows(NamedTuple):
    """Which row is which: ``unit (R,)`` counts the ablated units of this call, sorted; ``example (R,)`` the batch."""

    unit: Tensor
    example: Tensor


_ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Tanh,
    nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS: set[Any] = {
    torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.elu, F.leaky_relu, F.mish,
}  # fmt: skip
_ELEMENTWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "float"}
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_ADDS: set[Any] = {operator.add, operator.iadd, torch.add}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


_CACHE = 2**24  # bytes of one value for all rows at once


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.leaves or bool(super().is_leaf_module(m, module_qualified_name))


class Restart:
    """A traced model that can be run again from a site.

    Args:
        model: in evaluation mode.
        sites: where it will be restarted; every site's layer is called once and is not inside another site's layer.

    Raises:
        CannotRestart: the model cannot be traced, a site's layer is not called exactly once or does not give one row
            an example, or the trace does not do what the model does.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], example: Tensor) -> None:
        model = getattr(model, "_orig_mod", model)
        try:
            graph = _Tracer({site.module for site in sites}).trace(model)
        except Exception as error:
            raise CannotRestart(f"torch.fx cannot trace {type(model).__name__}: {error}") from error
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.modules = dict(model.named_modules())
        self.model = model
        self._node_of: dict[tuple[str, str], fx.Node] = {}
        for site in sites:
            calls = [n for n in self.nodes if n.op == "call_module" and self.modules.get(str(n.target)) is site.module]
            if len(calls) != 1 or not calls[0].args:
                raise CannotRestart(f"The layer of site {site.name!r} is called {len(calls)} times.")
            self._node_of[site.name, site.side] = calls[0]
        self._after = {node: self._downstream(node) for node in set(self._node_of.values())}
        self._scales = self._learn_shapes(example)
        for site in sites:
            node = self._site_node(site)
            if not isinstance(node, fx.Node) or self._scales[node] != 1:
                raise CannotRestart(f"Site {site.name!r} does not hold one tensor with one row an example.")
            if self.nodes[-1] not in self._after[self._node_of[site.name, site.side]]:
                raise CannotRestart(f"Site {site.name!r} does not reach the output.")
        self._kept: dict[fx.Node, Any] = {}
        self._size = 0
        self._convs: dict[nn.Module, Conv3x3] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Run the whole model and keep every value; returns the logits ``(B, C)``."""
        self._size = len(x)
        self._kept = self._run_all(x)
        return as_logits(self._kept[self.nodes[-1]])

    def forget(self) -> None:
        """Free what the last :meth:`forward` kept."""
        self._kept = {}

    def site_value(self, site: Site) -> Tensor:
        """What the site's units were in the last :meth:`forward`."""
        value: Tensor = self._kept[self._site_node(site)]
        return value

    def _site_node(self, site: Site) -> fx.Node:
        node = self._node_of[site.name, site.side]
        return node if site.side == "output" else node.args[0]  # type: ignore[return-value]

    def rows_at_once(self, site: Site, limit: int) -> int:
        """How many rows to compute together, at most ``limit``: on a CPU so many that the widest value after the site
        stays in the cache."""
        if self.site_value(site).device.type != "cpu":
            return limit
        after = [self._kept[node] for node in self._after[self._node_of[site.name, site.side]]]
        widest = max((v.numel() * v.element_size() // self._size for v in after if isinstance(v, Tensor)), default=1)
        return max(1, min(limit, _CACHE // max(1, widest)))

    def ablated(self, site: Site, units: Tensor, centre: Tensor | None) -> Tensor:
        """Logits ``(U, B, C)`` with each of ``units (U,)`` in turn set to ``centre (U, channels_per_unit)`` or zero."""
        base, k, size = self.site_value(site), site.channels_per_unit, self._size
        axis = site.unit_axis(base)
        channels = units[:, None] * k + torch.arange(k, device=units.device)
        rows = Rows(
            torch.arange(len(units), device=base.device).repeat_interleave(size),
            torch.arange(size, device=base.device).repeat(len(units)),
        )
        per_row = channels.repeat_interleave(size, 0)
        shape = [len(units) * size, *base.shape[1:]]
        shape[axis] = k
        value = base.new_zeros(shape)
        if centre is not None:
            tail = [1] * (-1 - axis)
            middle = [1] * (len(shape) - 2 - len(tail))
            value += centre.to(base).repeat_interleave(size, 0).view(-1, *middle, k, *tail)
        logits = as_logits(self._kept[self.nodes[-1]])
        out = logits.repeat(len(units), 1)
        start = Narrow(value, per_row, axis)
        changed = (value != _channels_of(base, start, rows.example)).flatten(1).any(1)
        where = torch.arange(len(out), device=out.device)
        if not bool(changed.all()):
            where = changed.nonzero()[:, 0]
            start = Narrow(value[where], per_row[where], axis)
            rows = Rows(rows.unit[where], rows.example[where])
        if len(where):
            result, kept = self._continue(site, start, rows)
            out[where[kept]] = as_logits(result).to(out.dtype)
        return out.view(len(units), size, -1)

    # -- running ----------------------------------------------------------------------------------------------------

    def _run_all(self, x: Tensor, keep: bool = True) -> dict[fx.Node, Any]:
        """Every value, as it was before anything was rewritten in place; without ``keep`` as the model itself runs, to
        see that it never reads a rewritten value."""
        values: dict[fx.Node, Any] = {}
        versions: dict[fx.Node, int] = {}
        given = False
        for node in self.nodes:
            for n in node.all_input_nodes:
                if _version(values[n]) != versions[n] and node.op != "output":
                    raise CannotRestart(f"{n.name!r} is rewritten in place and read again by {node.name!r}.")
            if node.op == "placeholder":
                if not given:
                    values[node], given = x, True
                elif node.args:
                    values[node] = node.args[0]
                else:
                    raise CannotRestart("The model takes more than one input.")
            elif node.op == "output":
                values[node] = _plain(node.args[0], values.__getitem__)
            else:
                values[node] = self._call(node, values.__getitem__, keep)
            versions[node] = _version(values[node])
        if keep and any(_version(values[n]) != versions[n] for n in values):
            raise CannotRestart("A layer rewrites what it reads.")
        return values

    def _call(self, node: fx.Node, value_of: Callable[[fx.Node], Any], keep: bool = True) -> Any:
        args, kwargs = _plain(node.args, value_of), _plain(node.kwargs, value_of)
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if keep and getattr(module, "inplace", False):  # what was kept must not be rewritten
                args = (args[0].clone(), *args[1:])
            return module(*args, **kwargs)
        if node.op == "call_function":
            if keep and kwargs.get("inplace") is True:
                kwargs = {**kwargs, "inplace": False}
            target = operator.add if keep and node.target is operator.iadd else node.target
            return target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            if keep and str(node.target).endswith("_") and not str(node.target).endswith("__"):
                args = (args[0].clone(), *args[1:])
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            value: Any = self.model
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value
        raise CannotRestart(f"Unknown operation {node.op!r}.")

    def _continue(self, site: Site, start: Narrow, rows: Rows) -> tuple[Any, Tensor]:
        """The output for the rows that are still different at the end, and which of the rows those are."""
        origin = self._node_of[site.name, site.side]
        state: dict[fx.Node, Any] = {}
        kept = torch.arange(len(rows.unit), device=rows.unit.device)
        if site.side == "output":
            state[origin] = start
            todo = self._after[origin]
        else:
            todo = [origin, *self._after[origin]]
        last_use = {n: user for user in todo for n in user.all_input_nodes}
        for node in todo:
            inputs = dict.fromkeys(node.all_input_nodes)
            if node is origin:
                inputs = {node.args[0]: None}  # type: ignore[dict-item]
                local = {node.args[0]: start}
            else:
                local = {n: state[n] for n in inputs if n in state}
            if node.op == "output":
                return _plain(node.args[0], partial(self._wide, state=state, rows=rows)), kept
            result = self._narrow_rule(node, local, rows)  # type: ignore[arg-type]
            if result is None:
                widened = {n: self._widen(n, v, rows) for n, v in local.items()}  # type: ignore[arg-type]
                for n, v in widened.items():
                    if n in state:
                        state[n] = v  # type: ignore[index]
                result = self._overwrite(node, widened, state, last_use)  # type: ignore[arg-type]
                if result is None:
                    result = self._wide_call(node, widened, rows)  # type: ignore[arg-type]
            if isinstance(result, Narrow) and result.value.dtype != self._kept[node].dtype:
                result = result._replace(value=result.value.to(self._kept[node].dtype))
            state[node] = result
            for n in list(state):
                if n is not node and last_use.get(n) is node:
                    del state[n]
            live = [v for v in state.values()]
            if isinstance(result, Narrow) and len(live) == 1 and _is_activation(node, self.modules):
                # Only this value carries the change: rows in which an activation hid it are done.
                changed = (result.value != _channels_of(self._kept[node], result, rows.example)).flatten(1).any(1)
                if not bool(changed.all()):
                    keep = changed.nonzero()[:, 0]
                    kept, rows = kept[keep], Rows(rows.unit[keep], rows.example[keep])
                    state[node] = Narrow(result.value[keep], result.channels[keep], result.axis)
                    if not len(keep):
                        logits = as_logits(self._kept[self.nodes[-1]])
                        return logits[:0], kept
        raise CannotRestart("The site does not reach the output.")

    def _wide(self, node: fx.Node, state: dict[fx.Node, Any], rows: Rows) -> Any:
        return self._widen(node, state[node], rows) if node in state else self._expand(node, rows)

    def _widen(self, node: fx.Node, value: Any, rows: Rows) -> Any:
        if not isinstance(value, Narrow):
            return value
        base = self._kept[node][rows.example]
        index = value.channels.view(len(base), *[1] * (base.ndim - 1 + value.axis), -1, *[1] * (-1 - value.axis))
        return base.scatter_(base.ndim + value.axis, index.expand_as(value.value), value.value.to(base.dtype))

    def _expand(self, node: fx.Node, rows: Rows) -> Any:
        """An unchanged value for all rows: tensors by example, sizes by the number of rows."""
        return self._expand_value(self._kept[node], self._scales[node], rows)

    def _expand_value(self, value: Any, scale: Any, rows: Rows) -> Any:
        if isinstance(scale, tuple):
            return type(value)(self._expand_value(v, s, rows) for v, s in zip(value, scale, strict=True))
        if scale == 0:
            return value
        if isinstance(value, Tensor):
            if scale == 1:
                return value[rows.example]
            return value.reshape(self._size, scale, *value.shape[1:])[rows.example].flatten(0, 1)
        return scale * len(rows.unit)

    def _overwrite(
        self, node: fx.Node, local: dict[fx.Node, Any], state: dict[fx.Node, Any], last_use: dict[fx.Node, fx.Node]
    ) -> Any:
        """The result of an in-place layer on a value that nothing else will read, else ``None``."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        source = node.args[0]
        module = self.modules[str(node.target)]
        if not getattr(module, "inplace", False) or last_use.get(source) is not node:  # type: ignore[arg-type]
            return None
        value = local.get(source)  # type: ignore[arg-type]
        if not isinstance(value, Tensor) or source not in state:
            return None
        where = value.untyped_storage().data_ptr()
        others = [v.value if isinstance(v, Narrow) else v for n, v in state.items() if n is not source]
        shared = any(isinstance(v, Tensor) and v.untyped_storage().data_ptr() == where for v in others)
        return None if shared else module(value)

    def _wide_call(self, node: fx.Node, local: dict[fx.Node, Any], rows: Rows) -> Any:
        if node.op == "call_module" and not node.kwargs and len(node.args) == 1 and node.args[0] in local:
            module, x = self.modules[str(node.target)], local[node.args[0]]  # type: ignore[index]
            if isinstance(module, nn.Conv2d) and Conv3x3.pays(module, x) and not _hooked(module):
                if module not in self._convs:
                    self._convs[module] = Conv3x3(module)
                return self._convs[module](x)
        return self._call(node, lambda n: local[n] if n in local else self._expand(n, rows))

    # -- rules that keep a value narrow -----------------------------------------------------------------------------

    def _narrow_rule(self, node: fx.Node, local: dict[fx.Node, Any], rows: Rows) -> Any:
        """The node's value where it can be had from the changed channels alone, else ``None``."""
        if not local or not all(isinstance(v, Narrow) for v in local.values()):
            return None
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or not isinstance(self._kept[node], Tensor):
            return None
        if node.op == "call_function" and node.target in _ADDS and len(node.args) == 2 and not node.kwargs:
            return self._add(node, local, rows)
        if len(local) != 1 or first not in local:
            return None
        narrow: Narrow = local[first]
        base = self._kept[first]
        same = self._kept[node]
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if _hooked(module):
                return None
            if type(module) in _ELEMENTWISE_MODULES:
                return narrow._replace(value=_plain_module(module, narrow.value))
            if type(module) in _BATCH_NORMS and module.running_var is not None and narrow.axis == 1 - base.ndim:
                return _batch_norm(module, narrow)
            if type(module) in _POOLS and base.ndim == 4 and narrow.axis == -3:
                return narrow._replace(value=module(narrow.value))
            if type(module) is nn.Conv2d and base.ndim == 4 and narrow.axis == -3 and module.padding_mode == "zeros":
                return self._conv(node, module, narrow, base, rows)
            if type(module) is nn.Linear and narrow.axis == -1:
                change = narrow.value - _channels_of(base, narrow, rows.example)
                return _spread_linear(same, change, module.weight, narrow.channels, rows)
            if type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
                return _flatten(narrow, base)
        elif node.op == "call_function":
            if node.target in _ELEMENTWISE_FUNCTIONS:
                extra = {k: v for k, v in node.kwargs.items() if k != "inplace"}
                if not any(isinstance(a, fx.Node) for a in (*node.args[1:], *extra.values())):
                    return narrow._replace(value=node.target(narrow.value, *node.args[1:], **extra))  # type: ignore
            if node.target is torch.flatten and node.args[1:] in ((1,), (1, -1)) and not node.kwargs:
                return _flatten(narrow, base)
        elif node.op == "call_method":
            if node.target in _ELEMENTWISE_METHODS and not node.args[1:] and not node.kwargs:
                return narrow._replace(value=getattr(narrow.value.clone(), str(node.target))())
            if node.target == "flatten" and node.args[1:] in ((1,), (1, -1)) and not node.kwargs:
                return _flatten(narrow, base)
            over_map = node.args[1:] in (((2, 3),), ([2, 3],), ((-2, -1),), ([-2, -1],)) and not node.kwargs
            if node.target == "mean" and base.ndim == 4 and narrow.axis == -3 and over_map:
                return Narrow(narrow.value.mean((2, 3)), narrow.channels, -1)
        return None

    def _add(self, node: fx.Node, local: dict[fx.Node, Any], rows: Rows) -> Any:
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return None
        base = self._kept[a], self._kept[b]
        if not isinstance(base[0], Tensor) or not isinstance(base[1], Tensor) or base[0].shape != base[1].shape:
            return None
        if a in local and b in local:
            same = a is b or (
                local[a].axis == local[b].axis
                and local[a].channels.shape == local[b].channels.shape
                and bool((local[a].channels == local[b].channels).all())
            )
            return local[a]._replace(value=local[a].value + local[b].value) if same else None
        changed, other = (a, base[1]) if a in local else (b, base[0])
        narrow: Narrow = local[changed]
        return narrow._replace(value=narrow.value + _channels_of(other, narrow, rows.example))

    def _conv(self, node: fx.Node, module: nn.Conv2d, narrow: Narrow, base: Tensor, rows: Rows) -> Any:
        if isinstance(module.padding, str) or narrow.channels.shape[1] != 1:
            return None
        if module.groups == module.in_channels == module.out_channels and module.groups > 1:
            weight = module.weight[narrow.channels[:, 0]]
            value = narrow.value.transpose(0, 1)
            value = F.conv2d(value, weight, None, module.stride, module.padding, module.dilation, len(weight))
            value = value.transpose(0, 1)
            if module.bias is not None:
                value = value + module.bias[narrow.channels][:, :, None, None]
            return narrow._replace(value=value)
        if module.groups != 1:
            return None
        change = narrow.value - _channels_of(base, narrow, rows.example)
        return _spread_conv(self._kept[node], change, module, narrow.channels[:, 0], rows)

    # -- tracing ----------------------------------------------------------------------------------------------------

    def _downstream(self, origin: fx.Node) -> list[fx.Node]:
        reached = {origin}
        order = []
        for node in self.nodes:
            if node is not origin and any(n in reached for n in node.all_input_nodes):
                reached.add(node)
                order.append(node)
        return order

    def _learn_shapes(self, example: Tensor) -> dict[fx.Node, Any]:
        """How often the batch size is in each value's first axis (0: not at all), from runs of two sizes.

        Also checks that the trace does what the model does, and that the rows of a value do not depend on each other.
        """
        try:
            x = example[torch.arange(3, device=example.device) % len(example)]
            small, large = self._run_all(x[:2]), self._run_all(x)
            self._run_all(x.clone(), keep=False)
            if not _close(as_logits(self.model(x)), as_logits(large[self.nodes[-1]]), 0.01):
                raise CannotRestart("The trace gives other logits than the model.")
            return {node: _scale(small[node], large[node], node) for node in small if node.op != "output"}
        except CannotRestart:
            raise
        except Exception as error:
            raise CannotRestart(f"The traced model does not run: {error}") from error


def _close(a: Tensor, b: Tensor, near: float) -> bool:
    """Equal but for rounding, which may be that of bfloat16."""
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    scale = float(a.nan_to_num(0, 0, 0).abs().mean())
    return a.shape == b.shape and torch.allclose(a, b, near, near * scale, equal_nan=True)


def _version(value: Any) -> int:
    """Counts the in-place changes of a tensor and of all its views."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _scale(small: Any, large: Any, node: fx.Node) -> Any:
    if isinstance(small, Tensor) and isinstance(large, Tensor):
        if small.shape == large.shape:
            factor = 0
        else:
            factor, rest = divmod(small.shape[0], 2)
            if rest or large.shape[0] != 3 * factor or small.shape[1:] != large.shape[1:]:
                raise CannotRestart(f"The batch is not in the first axis of {node.name!r}.")
        if not _close(small, large[: len(small)] if factor else large, 0.1):
            raise CannotRestart(f"The rows of {node.name!r} are mixed, or depend on each other.")
        return factor
    if isinstance(small, torch.Size | tuple | list):
        return tuple(_scale(s, g, node) for s, g in zip(small, large, strict=True))
    if isinstance(small, int) and not isinstance(small, bool) and small != large:
        factor, rest = divmod(small, 2)
        if rest or large != 3 * factor:
            raise CannotRestart(f"{node.name!r} is not a multiple of the batch size.")
        return factor
    return 0


def _plain(value: Any, value_of: Callable[[fx.Node], Any]) -> Any:
    return fx.node.map_arg(value, value_of)


def _plain_module(module: nn.Module, value: Tensor) -> Tensor:
    out: Tensor = module(value.clone() if getattr(module, "inplace", False) else value)
    return out


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_activation(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) in _ELEMENTWISE_MODULES
    return node.target in _ELEMENTWISE_FUNCTIONS or node.target in ("relu", "relu_")


def _channels_of(base: Tensor, narrow: Narrow, example: Tensor) -> Tensor:
    """The kept values of the changed channels, shaped like ``narrow.value``."""
    channels_second = base.movedim(narrow.axis, 1)
    picked = channels_second[example[:, None], narrow.channels]
    return picked.movedim(1, narrow.axis)


def _batch_norm(module: nn.BatchNorm2d, narrow: Narrow) -> Narrow:
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None:
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


def _flatten(narrow: Narrow, base: Tensor) -> Narrow | None:
    if base.ndim < 3:
        return narrow if base.ndim == 2 else None
    if narrow.axis == 1 - base.ndim and base[0, 0].numel() == 1:
        return Narrow(narrow.value.flatten(1), narrow.channels, -1)
    return None


def _groups_of(rows: Rows) -> list[tuple[int, int]]:
    """Start and end of the rows of each unit that has any."""
    counts = torch.unique_consecutive(rows.unit, return_counts=True)[1].tolist()
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _spread_linear(kept: Tensor, change: Tensor, weight: Tensor, channels: Tensor, rows: Rows) -> Tensor:
    """``W(x + Δ)`` from ``W x`` and the changed inputs ``(R, ..., k)``."""
    out = kept.index_select(0, rows.example).contiguous()
    for start, end in _groups_of(rows):
        columns = weight[:, channels[start]]
        out[start:end] += change[start:end].to(out.dtype) @ columns.t().to(out.dtype)
    return out


def _spread_conv(kept: Tensor, change: Tensor, module: nn.Conv2d, channels: Tensor, rows: Rows) -> Tensor:
    """``W * (x + Δ)`` from ``W * x`` and the changed input channel ``(R, 1, H, W)``; channels last in memory."""
    taps = F.unfold(change, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    taps = taps.transpose(1, 2)  # (R, positions, kernel)
    height, width = kept.shape[2:]
    out = kept.permute(0, 2, 3, 1).reshape(len(kept), height * width, -1).index_select(0, rows.example)
    out = out.contiguous()
    taps, weight = taps.to(out.dtype), module.weight.flatten(2).to(out.dtype)
    for start, end in _groups_of(rows):
        block = out[start:end].flatten(0, 1)
        block.addmm_(taps[start:end].flatten(0, 1), weight[:, int(channels[start])].t())
    return out.view(len(out), height, width, -1).permute(0, 3, 1, 2)
