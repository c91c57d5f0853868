"""Run the rest of a network again from one of its layers, for many ablated units at once.

The model is traced once with ``torch.fx``.  For a batch, every intermediate value is kept.  Ablating a unit changes one
channel of one of them, so from there on a value is in one of three states:

* *unchanged*: it does not depend on the site and is read from what was kept;
* *narrow*: only some channels of each row changed (through batch norm, activations, pooling, residual sums, depthwise
  convolutions), and only those are computed;
* *wide*: every channel may have changed, and it is computed for all rows.

A convolution or linear layer turns narrow into wide, and being linear it needs only the changed channels to do so:
:math:`W(x + \\Delta) = W x + W_{:,c}\\,\\Delta_c`.  The rules by operation are a table in :mod:`demem.tracing.narrow`.
A *row* is one example under one ablated unit; rows that the ablation does not change at all (a dead unit), or whose
change an activation has hidden, are dropped on the way.

These models are refused with :class:`CannotRestart`, and are run whole:

=====================================================  ================================================================
refused                                                because
=====================================================  ================================================================
``torch.fx`` cannot trace the model                    the order of its operations is not known
it takes more than one input tensor                    only one batch axis is followed
a site's layer is called never or several times        there is not one place to restart from
a site does not reach the output                       nothing depends on it
a value is rewritten in place and read again           what was kept would not be what the model read
the batch is not in the first axis of a value          rows could not be selected
rows depend on each other (batch statistics)           an ablated row would change the others
the trace gives other logits than the model            the forward depends on values, not only on shapes
=====================================================  ================================================================
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from demem.batch import as_logits
from demem.sites import Site
from demem.tracing.narrow import (
    ADDS,
    CannotRestart,
    Narrow,
    Rows,
    Step,
    add,
    channels_of,
    has_hooks,
    is_activation,
    rule_of,
    widen,
)
from demem.tracing.winograd import Conv3x3

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
        example: inputs of one batch, to learn from where the batch size is in the shapes of all values.

    Raises:
        CannotRestart: the model is one of those that the module's table refuses.
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
                raise CannotRestart(f"Site {site.name!r} does not hold one tensor with one row per example.")
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
        """Return the site's activation in the last :meth:`forward`, ``(B, ...)``."""
        value: Tensor = self._kept[self._site_node(site)]
        return value

    def _site_node(self, site: Site) -> fx.Node:
        node = self._node_of[site.name, site.side]
        return node if site.side == "output" else node.args[0]  # type: ignore[return-value]

    def rows_at_once(self, site: Site, limit: int) -> int:
        """Return how many rows to compute together, at most ``limit``.

        On a CPU the largest value after the site should stay in the cache.
        """
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
        changed = (value != channels_of(base, start, rows.example)).flatten(1).any(1)
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
        """Compute every value, as it is before anything is rewritten in place.

        Without ``keep`` operations rewrite in place as in the model itself, to check that no rewritten value is read.
        """
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
        """Run on from the site; returns the output for the rows that still differ at the end, and their numbers."""
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
            if isinstance(result, Narrow) and len(live) == 1 and is_activation(node, self._layer(node)):
                # Only this value carries the change, so rows in which the activation hid it are done.
                changed = (result.value != channels_of(self._kept[node], result, rows.example)).flatten(1).any(1)
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
        return widen(self._kept[node], value, rows.example) if isinstance(value, Narrow) else value

    def _expand(self, node: fx.Node, rows: Rows) -> Any:
        """Repeat an unchanged value for all rows: tensors by example, sizes by the number of rows."""
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
        """Run an in-place layer on a value that nothing else will read; ``None`` if it is not such a layer or value."""
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
            if isinstance(module, nn.Conv2d) and Conv3x3.pays(module, x) and not has_hooks(module):
                if module not in self._convs:
                    self._convs[module] = Conv3x3(module)
                return self._convs[module](x)
        return self._call(node, lambda n: local[n] if n in local else self._expand(n, rows))

    def _narrow_rule(self, node: fx.Node, local: dict[fx.Node, Any], rows: Rows) -> Any:
        """Compute the node by its rule of :mod:`demem.tracing.narrow`; ``None`` if it has none that applies."""
        if not local or not all(isinstance(v, Narrow) for v in local.values()):
            return None
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or not isinstance(self._kept[node], Tensor):
            return None
        if node.op == "call_function" and node.target in ADDS and len(node.args) == 2 and not node.kwargs:
            second = node.args[1]
            if not isinstance(second, fx.Node):
                return None
            return add(local.get(first), local.get(second), (self._kept[first], self._kept[second]), rows)
        if len(local) != 1 or first not in local:
            return None
        layer = self._layer(node)
        rule = rule_of(node, layer)
        return rule and rule(Step(node, layer, local[first], self._kept[first], self._kept[node], rows))

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

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
        """Learn how many rows per example each value has (0: it does not depend on the batch), from runs of two sizes.

        Also check that the trace does what the model does, and that the rows of a value do not depend on each other.
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
    """Whether two values are equal up to rounding, which may be that of bfloat16."""
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    scale = float(a.nan_to_num(0, 0, 0).abs().mean())
    return a.shape == b.shape and torch.allclose(a, b, near, near * scale, equal_nan=True)


def _version(value: Any) -> int:
    """Count the in-place changes of a tensor and of all its views."""
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
