"""Name the places in a network where units live.

A *site* is one side (output or input) of one layer; a *unit* is one channel of a convolution, one feature of a
linear layer or of a token, or one attention head.  Patterns are globs over ``named_modules()``: ``*`` stands for
one part of a dotted name, ``**`` for any number of parts.  A suffix selects the side:

=========================  ================================================================================
``"layer1.*.conv2"``       outputs of the matching layers
``"head:input"``           inputs of the layer, e.g. the residual stream or the pooled features before the head
``"blocks.*.attn:heads"``  attention heads: inputs of an attention module's output projection, head by head
=========================  ================================================================================
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Side = Literal["output", "input"]

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention)
_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.MultiheadAttention,
)

# What lists of blocks are called: in timm, torchvision and most transformers; in BERT and its kin; T5; GPT-2.
_BLOCKS = ("blocks", "stages", "layers", "layer", "block", "h")


@dataclass(frozen=True)
class Site:
    """One side of one layer, and how its channels form units.

    Attributes:
        name: the pattern that matches this site alone: ``"layer1.0.conv2"``, ``"fc:input"``, ``"blocks.0.attn:heads"``.
        module: the layer.
        side: ``"output"`` or ``"input"`` of the layer.
        num_units: number of units N; ``None`` where only a forward pass shows it (activations, blocks, pools).
        channels_per_unit: number of consecutive channels that form one unit (the head width for ``:heads``, else 1).
        batch_first: activations are ``(B, T, C)``; ``False`` for ``(T, B, C)`` in some of torch's transformers.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> site = find_sites(model, "2:input")[0]
        >>> site.name, site.side, site.num_units
        ('2:input', 'input', 3)
        >>> handle = site.hook(torch.zeros_like)  # what the last layer reads is replaced by zeros
        >>> bool((model(torch.randn(5, 4)) == model[2].bias).all())
        True
        >>> handle.remove()
    """

    name: str
    module: nn.Module
    side: Side = "output"
    num_units: int | None = None
    channels_per_unit: int = 1
    batch_first: bool = True

    def examples_first(self, activation: Tensor) -> Tensor:
        """Return a view of ``activation`` with the batch as its first axis."""
        return activation if self.batch_first or activation.ndim != 3 else activation.transpose(0, 1)

    def unit_axis(self, activation: Tensor) -> int:
        """Return the axis of ``activation`` that counts channels, as a negative index."""
        return unit_axis(self.module, activation)

    def hook(self, function: Callable[[Tensor], Tensor | None], prepend: bool = False) -> RemovableHandle:
        """Call ``function`` with the site's activation in every forward pass.

        Args:
            function: takes the tensor that the layer returns (or reads) and returns its replacement, or ``None`` to
                keep it.  In a tuple, list or dict it takes the first tensor.
            prepend: run before the hooks that are already registered, e.g. those of :class:`demem.sites.Gates`.

        Returns:
            A handle whose ``remove()`` takes the hook off.
        """

        def edit(value: object) -> object:
            result = function(first_tensor(value))
            return None if result is None else replace_first_tensor(value, result)

        if self.side == "output":
            return self.module.register_forward_hook(lambda module, args, output: edit(output), prepend=prepend)
        return self.register(lambda module, args, kwargs: edit_call(module, args, kwargs, edit), prepend)

    def register(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """Register one of torch's own hooks on the site's side.

        Args:
            hook: ``(module, args, output)`` on the output side, ``(module, args, kwargs)`` on the input side.  A
                module-level function survives ``copy.deepcopy`` and pickling of the model.
            prepend: run before the hooks that are already registered.
        """
        if self.side == "output":
            return self.module.register_forward_hook(hook, prepend=prepend)
        return self.module.register_forward_pre_hook(hook, prepend=prepend, with_kwargs=True)

    def require_num_units(self) -> int:
        """Return ``num_units``.

        Raises:
            ValueError: it is not known before a forward pass; the message says which layer to name instead.
        """
        if self.num_units is None:
            raise ValueError(
                f"The number of units at site {self.name!r} ({type(self.module).__name__}) is not known before a "
                "forward pass, so it cannot be gated. Name a convolution, linear or norm layer, or the input of "
                "the layer that follows, e.g. 'fc:input'."
            )
        return self.num_units


def unit_axis(module: nn.Module, activation: Tensor) -> int:
    """Return the channel axis of what ``module`` reads or returns, as a negative index.

    Convolutions, batch and group norms: ``(B, C, *spatial)``.  Linear, layer norm, attention: ``(B, ..., C)``.
    Other modules: ``(B, C, *spatial)`` for 4-D and 5-D activations and ``(B, ..., C)`` for the rest, unless only the
    other axis is as long as a layer inside the module is wide (blocks of 1-D convolutions; Swin's blocks, which return
    ``(B, H, W, C)``).
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return -1 - len(module.kernel_size)
    first, last = 1 - activation.ndim, -1
    if isinstance(module, _CHANNELS_FIRST) or type(module).__name__ == "LayerNorm2d":
        return first
    if isinstance(module, _CHANNELS_LAST) or type(module).__name__.endswith("RMSNorm"):
        return last
    axis, other = (first, last) if activation.ndim >= 4 else (last, first)
    widths = {_num_outputs(layer) for layer in module.modules()}
    return other if activation.shape[axis] not in widths and activation.shape[other] in widths else axis


def own_weight(site: Site) -> nn.Parameter:
    """Return the weight of a site's layer, if its elements belong to the site's units and can be changed.

    Raises:
        ValueError: the layer has no such weight (blocks, activations, pools, norms without parameters, torch's
            attention), or its weight is computed from other parameters (weight norm, spectral norm).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> own_weight(find_sites(model, "0")[0]) is model[0].weight
        True
        >>> own_weight(find_sites(model, "1")[0])
        Traceback (most recent call last):
        ValueError: Site '1' (ReLU) has no weight of its own by unit. Name convolution, linear or norm layers for
        this, e.g. '**.conv2'.
    """
    module = site.module
    by_unit = site.num_units is not None and not isinstance(module, nn.MultiheadAttention)
    weight = module._parameters.get("weight")  # the attribute of a parametrised layer is computed
    if by_unit and weight is not None:
        return weight
    if by_unit and isinstance(getattr(module, "weight", None), Tensor):
        raise ValueError(
            f"The weight of site {site.name!r} is computed from others, so it has no gradient of its own and cannot be "
            "changed. Call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first (for the old "
            "weight_norm and spectral_norm their own remove_ function)."
        )
    raise ValueError(
        f"Site {site.name!r} ({type(module).__name__}) has no weight of its own by unit. Name convolution, linear or "
        "norm layers for this, e.g. '**.conv2'."
    )


def find_sites(model: nn.Module, patterns: str | Sequence[str]) -> list[Site]:
    """Resolve layer patterns to sites, in the order of ``model.named_modules()``.

    Args:
        model: any module; compiled parts (``torch.compile``) go by the names of the layers inside them.
        patterns: one glob or several: ``*`` for one part of a dotted name, ``**`` for any number of parts; with the
            suffix ``:output`` (default), ``:input`` or ``:heads``.

    Returns:
        At least one site per pattern, without repeats.

    Raises:
        ValueError: a pattern matches nothing (the message lists the layers), its suffix is unknown, or ``:heads``
            matches a module that is not attention.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> [(site.name, site.num_units) for site in find_sites(model, ["0", "3:input"])]
        [('0', 8), ('3:input', 288)]
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("No layer pattern was given. Pass at least one, e.g. 'blocks.*' or 'fc:input'.")
    modules = named_layers(model)
    found: dict[str, Site] = {}
    for pattern in patterns:
        glob, _, suffix = pattern.partition(":")
        if suffix not in ("", "output", "input", "heads"):
            raise ValueError(
                f"Unknown suffix ':{suffix}' in layer pattern {pattern!r}. Use ':output', ':input' or ':heads'."
            )
        matches = _glob_to_regex(glob)
        hits = {name: module for name, module in modules.items() if matches.fullmatch(name)}
        if suffix == "heads":
            hits = {n: m for n, m in hits.items() if _head_projection(m) is not None} or hits
        if not hits:
            raise ValueError(_nothing_matches(pattern, modules))
        for name in hits:
            site = _make_site(modules, name, suffix)
            found.setdefault(site.name, site)
    position = {name: i for i, name in enumerate(modules)}
    return sorted(found.values(), key=lambda site: position[site.name.partition(":")[0]])


def find_head(model: nn.Module, name: str | None = None) -> tuple[str, nn.Linear]:
    """Find the linear layer that computes the logits.

    Args:
        model: any module.
        name: qualified name of the layer.  Without it, the layer that a timm model returns from ``get_classifier()``,
            else the last ``nn.Linear`` in the order of definition.

    Returns:
        Its qualified name and the layer.

    Raises:
        ValueError: there is no such layer, or it is not an ``nn.Linear``.

    Example:
        >>> find_head(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        ('2', Linear(in_features=3, out_features=2, bias=True))
    """
    layers = named_layers(model)
    if name is not None:
        if not isinstance(layers.get(name), nn.Linear):
            raise ValueError(
                f"head={name!r} is not an nn.Linear of this model. Its linear layers: "
                f"{_listing([n for n, m in layers.items() if isinstance(m, nn.Linear)])}"
            )
        return name, layers[name]  # type: ignore[return-value]
    for module in [model, *layers.values()]:
        get_classifier = getattr(module, "get_classifier", None)
        if callable(get_classifier):
            head = get_classifier()
            for layer_name, layer in layers.items():
                if layer is head and isinstance(layer, nn.Linear):
                    return layer_name, layer
    linear = [(n, m) for n, m in layers.items() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(
            "No nn.Linear was found to serve as the classification head. Layers: " + _listing(list(layers))
        )
    return linear[-1]


def default_sites(model: nn.Module, head: str | None = None) -> list[Site]:
    """Choose sites where the user names none.

    They are the blocks or stages of a timm, torchvision or transformers model and the head's input; in a plain network
    the outputs of its convolutions and linear layers except the head, and the head's input.  Some may not run in the
    forward pass (a projector for another loss), so read them with ``optional=True``.

    Args:
        model: any module with a linear head.
        head: name of the head, see :func:`find_head`.

    Raises:
        ValueError: as :func:`find_head`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [site.name for site in default_sites(model)]
        ['0', '2:input']
    """
    head_name, head_layer = find_head(model, head)
    layers = named_layers(model)
    sites: list[Site] = []
    for name, module in layers.items():
        parent, _, last = name.rpartition(".")
        container = parent.rpartition(".")[2]
        is_block = container in _BLOCKS and last.isdigit()
        is_stage = re.fullmatch(r"layer\d+", last) is not None
        nested = any(name.startswith(s.name + ".") for s in sites)
        if (is_block or is_stage) and not nested and any(True for _ in module.children()):
            sites.append(_make_site(layers, name, ""))
    if not sites:
        sites = [
            _make_site(layers, name, "")
            for name, module in layers.items()
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module is not head_layer
        ]
    return [*sites, _make_site(layers, head_name, "input")]


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return ``named_modules()`` without the root, and without the ``_orig_mod`` that ``torch.compile`` adds to names.

    Example:
        >>> list(named_layers(nn.Sequential(torch.compile(nn.Linear(4, 3)), nn.ReLU())))
        ['0', '1']
    """
    layers = {}
    for name, module in model.named_modules():
        clean = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if clean:  # wrapper and layer have the same name; the layer comes second, and only its hooks run
            layers[clean] = module
    return layers


def _make_site(layers: Mapping[str, nn.Module], name: str, suffix: str) -> Site:
    module, batch_first = layers[name], _batch_first(layers, name)
    if suffix == "heads":
        projection = _head_projection(module)
        if projection is None:
            raise ValueError(
                f"{name!r} ({type(module).__name__}) has no attention heads that can be separated: ':heads' needs "
                "a module with 'num_heads' and a linear output projection called 'proj', 'out_proj' or 'out' that "
                "is called as a layer (nn.MultiheadAttention calls its projection by function)."
            )
        heads = int(module.num_heads)  # type: ignore[arg-type]
        return Site(f"{name}:heads", projection, "input", heads, projection.in_features // heads, batch_first)
    if suffix == "input":
        return Site(f"{name}:input", module, "input", _num_inputs(module), batch_first=batch_first)
    return Site(name, module, "output", _num_outputs(module), batch_first=batch_first)


def _batch_first(layers: Mapping[str, nn.Module], name: str) -> bool:
    """Return False for a recurrent layer, or inside a transformer of torch's own, that has the sequence first."""
    if isinstance(layers[name], nn.RNNBase):
        return bool(layers[name].batch_first)
    parts = name.split(".")
    around = [layers.get(".".join(parts[: i + 1])) for i in range(len(parts))]
    attention = [m for a in around if isinstance(a, _TRANSFORMERS) for m in a.modules()]
    return all(m.batch_first for m in attention if isinstance(m, nn.MultiheadAttention))


def _head_projection(module: nn.Module) -> nn.Linear | None:
    if not isinstance(getattr(module, "num_heads", None), int) or isinstance(module, nn.MultiheadAttention):
        return None
    for name in ("proj", "out_proj", "out"):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Linear):
            return projection
    return None


def _num_outputs(module: nn.Module) -> int | None:
    if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
        shape = getattr(module, "normalized_shape", None)
        if shape is None:
            return None if getattr(module, "weight", None) is None else int(module.weight.shape[-1])  # type: ignore
        return int(shape[-1])
    for name in (
        "out_channels",
        "out_features",
        "num_features",
        "num_channels",
        "embedding_dim",
        "embed_dim",
    ):
        value = getattr(module, name, None)
        if isinstance(value, int) and isinstance(module, (*_CHANNELS_FIRST, *_CHANNELS_LAST)):
            return value
    return None


def _num_inputs(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels
    if isinstance(module, (*_CHANNELS_FIRST, nn.LayerNorm)) or type(module).__name__.endswith("RMSNorm"):
        return _num_outputs(module)
    return None


def _glob_to_regex(glob: str) -> re.Pattern[str]:
    out = ""
    for token in re.split(r"(\*\*|\*|\?)", glob):
        out += {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}.get(token, re.escape(token))
    return re.compile(out)


def _nothing_matches(pattern: str, modules: dict[str, nn.Module]) -> str:
    kinds = [f"{name} ({type(module).__name__})" for name, module in modules.items()]
    return (
        f"Layer pattern {pattern!r} matches nothing ('*' stands for one part of a dotted name, '**' for any number). "
        f"The model has: {_listing(kinds)}"
    )


def _listing(names: Sequence[str], limit: int = 60) -> str:
    if not names:
        return "none"
    more = f", … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def first_tensor(value: object) -> Tensor:
    """Return a tensor itself, or the first one of a tuple, list or dict (as attention layers return them).

    Raises:
        TypeError: ``value`` holds no tensor in the first place.

    Example:
        >>> attention = nn.MultiheadAttention(4, num_heads=2)  # returns values and weights
        >>> first_tensor(attention(*[torch.randn(3, 1, 4)] * 3)).shape
        torch.Size([3, 1, 4])
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict) and value:
        return first_tensor(next(iter(value.values())))
    if isinstance(value, list | tuple) and value:
        return first_tensor(value[0])
    raise TypeError(f"Expected a tensor or a container whose first item is one, got {type(value).__name__}.")


def replace_first_tensor(value: object, tensor: Tensor) -> object:
    """Copy ``value`` with the tensor that :func:`first_tensor` finds replaced."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, dict):
        key = next(iter(value))
        copy = type(value)(value)
        copy[key] = replace_first_tensor(value[key], tensor)
        return copy
    if isinstance(value, tuple):
        items = [replace_first_tensor(value[0], tensor), *value[1:]]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [replace_first_tensor(value[0], tensor), *value[1:]]
    raise TypeError(f"Expected a tensor or a container whose first item is one, got {type(value).__name__}.")


def edit_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], edit: Callable[[object], object]
) -> tuple[Any, Any] | None:
    """Change the first thing that a module reads, be it passed by position or by keyword.

    Args:
        module: that is called with ``args`` and ``kwargs``.
        edit: takes the tensor or container that the module reads and gives its replacement, or ``None`` to keep it.

    Returns:
        the new arguments, as a forward pre-hook returns them, or ``None``.
    """
    if args:
        result = edit(args)
        return None if result is None else (result, kwargs)
    # The first parameter, not the first keyword: a block may be called block(mask=m, hidden_states=h).
    with suppress(ValueError):  # the signature of a compiled function is unknown
        parameters = inspect.signature(module.forward).parameters
        kwargs = {name: kwargs[name] for name in parameters if name in kwargs} | kwargs
    name = next(iter(kwargs))
    result = edit(kwargs[name])
    return None if result is None else (args, {**kwargs, name: result})


def check_finite(tensor: Tensor, where: str) -> Tensor:
    """Return ``tensor`` unchanged if all its values are finite.

    Args:
        tensor: any tensor.
        where: where it comes from, for the message.

    Raises:
        ValueError: a value is NaN or infinite.

    Example:
        >>> check_finite(torch.tensor([1.0, float("nan")]), "site 'fc:input'")
        Traceback (most recent call last):
        ValueError: 1 of 2 values at site 'fc:input' are NaN or infinite. ...
    """
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{bad} of {tensor.numel()} values at {where} are NaN or infinite. Look for a diverged loss (lower the "
            "learning rate), broken inputs, or overflow in float16."
        )
    return tensor
