"""What is done to the units that were traced: zero, mean, noise, re-initialise, rewind (You et al. 2025).

The weights of the units are changed, so that any model shows the effect (compiled, wrapped, exported).  For the output
of a layer the filter (or row) and bias that make the unit change; for an input the columns that read it.  Everything
else about the model, and all of it after :func:`intervene`, stays as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from demem.sites import Site
from demem.tracing import unit_of_weight

Intervention = Literal["zero", "mean", "noise", "reinitialise", "rewind"]
Units = Mapping[str, "Tensor | Sequence[int]"]

_KINDS = ("zero", "mean", "noise", "reinitialise", "rewind")


class _Change(NamedTuple):
    """Elements ``mask`` of a parameter of ``module``."""

    module: nn.Module
    name: str
    mask: Tensor


@contextmanager
def intervene(
    model: nn.Module,
    sites: Sequence[Site],
    units: Units,
    kind: Intervention = "zero",
    *,
    sigma: float | None = None,
    means: Mapping[str, Tensor] | None = None,
    reference_state: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[nn.Module]:
    """Change the units of a model for the length of a ``with`` block; arguments and errors as :func:`apply`.

    Afterwards the weights are what they were, bit for bit, also after an exception.  The random state is only used, and
    moved on, by ``noise`` and ``reinitialise`` (give a ``generator`` to leave the global one alone).

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> with intervene(model, find_sites(model, "0"), {"0": [1]}):
        ...     model(torch.ones(1, 2))[0, 1].item()
        0.0
    """
    undo = apply(
        model,
        sites,
        units,
        kind,
        sigma=sigma,
        means=means,
        reference_state=reference_state,
        generator=generator,
    )
    try:
        yield model
    finally:
        undo()


class Undo:
    """Call it to put back what :func:`apply` changed, bit for bit; a second call does nothing."""

    def __init__(self) -> None:
        self._saved: list[tuple[Tensor, Tensor, Tensor]] = []
        self._added: list[nn.Module] = []

    def save(self, parameter: Tensor, mask: Tensor) -> None:
        self._saved.append((parameter, mask, parameter.detach()[mask].clone()))

    def added_bias(self, module: nn.Module) -> None:
        self._added.append(module)

    @torch.no_grad()
    def __call__(self) -> None:
        for parameter, mask, values in reversed(self._saved):
            parameter[mask] = values
        for module in self._added:
            module.bias = None  # type: ignore[assignment]
        self._saved, self._added = [], []


@torch.no_grad()
def apply(
    model: nn.Module,
    sites: Sequence[Site],
    units: Units,
    kind: Intervention = "zero",
    *,
    sigma: float | None = None,
    means: Mapping[str, Tensor] | None = None,
    reference_state: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Undo:
    """Change the weights of the units in place.

    Args:
        model: whose ``named_parameters`` the sites' weights are.
        sites: convolution, linear and norm layers, their inputs, or attention heads.
        units: ``{site name: unit indices, or a bool mask (N,)}``.
        kind: ``"zero"``: the unit is zero. ``"mean"``: it is constantly ``means[site]``. ``"noise"``: N(0, σ²) is added
            to its weights. ``"reinitialise"``: its weights are drawn from N(0, σ²), its bias is zero. ``"rewind"``: its
            weights and bias are those of ``reference_state``.
        sigma: standard deviation; for ``noise`` and ``reinitialise`` that of the layer's own weights if ``None``.
        means: ``{site: (N · channels_per_unit,)}``, for ``"mean"``: the channel means of the site's activation.
        reference_state: a ``state_dict`` of an earlier checkpoint, for ``"rewind"``.
        generator: on the device of the weights.

    Returns:
        a function without arguments that undoes it.

    Raises:
        ValueError: unknown kind, site or unit; a site without weights of its own; or what the kind needs is missing.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Linear(2, 3)
        >>> undo = apply(model, [site := find_sites(nn.Sequential(model), "0")[0]], {site.name: [1]})
        >>> model(torch.ones(1, 2))[0, 1].item()
        0.0
        >>> undo()
        >>> bool(model(torch.ones(1, 2))[0, 1] != 0)
        True
    """
    if kind not in _KINDS:
        raise ValueError(f"Unknown intervention {kind!r}; use one of {', '.join(_KINDS)}.")
    by_name = {site.name: site for site in sites}
    unknown = sorted(set(units) - set(by_name))
    if unknown:
        raise ValueError(f"Units are given for {unknown}, which are not among the sites {sorted(by_name)}.")
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    chosen = {name: _unit_mask(by_name[name], value) for name, value in units.items()}
    changes = {name: _changes(by_name[name], mask) for name, mask in chosen.items()}
    rewound = {}
    if kind == "rewind":
        rewound = _find_reference(changes, names, reference_state)
    if kind == "mean" and (means is None or not set(units) <= set(means)):
        raise ValueError("The intervention 'mean' needs `means` for every site with a chosen unit.")
    undo = Undo()
    try:
        for site_name, parts in changes.items():
            site = by_name[site_name]
            if kind == "mean":
                _set_mean(site, chosen[site_name], means[site_name], undo)  # type: ignore[index]
                continue
            for part in parts:
                parameter: Tensor = getattr(part.module, part.name)
                undo.save(parameter, part.mask)
                if kind == "zero":
                    parameter[part.mask] = 0
                elif kind == "rewind":
                    parameter[part.mask] = rewound[id(parameter)].to(parameter)[part.mask]
                elif kind == "reinitialise":
                    parameter[part.mask] = _noise(parameter, part, sigma, generator) if part.name == "weight" else 0
                elif part.name == "weight":
                    parameter[part.mask] += _noise(parameter, part, sigma, generator)
    except BaseException:
        undo()
        raise
    return undo


@contextmanager
def intervene_weights(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    kind: Intervention = "zero",
    *,
    sigma: float | None = None,
    reference_state: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[nn.Module]:
    """The same for single weights (the unstructured form), undone exactly.

    Args:
        model: any module.
        masks: ``{parameter name: bool mask}`` from :func:`demem.tracing.top_weights`.
        kind: any but ``"mean"``, see :func:`apply`.
        sigma: see :func:`apply`.
        reference_state: see :func:`apply`.
        generator: see :func:`apply`.

    Raises:
        ValueError: unknown kind or parameter, or a mask of another shape.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with intervene_weights(model, {"weight": torch.tensor([[True, False]])}):
        ...     model.weight[0, 0].item()
        0.0
    """
    if kind not in _KINDS or kind == "mean":
        raise ValueError(f"Unknown intervention {kind!r} for single weights; use zero, noise, reinitialise or rewind.")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ValueError(f"The mask {name!r} of shape {tuple(mask.shape)} fits no parameter of the model.")
        if kind == "rewind" and name not in (reference_state or {}):
            raise ValueError(f"`reference_state` has no {name!r} to rewind to.")
    undo = Undo()
    try:
        with torch.no_grad():
            for name, mask in masks.items():
                p = parameters[name]
                mask = mask.to(p.device)
                undo.save(p, mask)
                if kind == "zero":
                    p[mask] = 0
                elif kind == "rewind":
                    p[mask] = reference_state[name].to(p)[mask]  # type: ignore[index]
                else:
                    drawn = _normal(int(mask.sum()), p, float(p.std()) if sigma is None else sigma, generator)
                    p[mask] = drawn if kind == "reinitialise" else p[mask] + drawn
        yield model
    finally:
        undo()


def _unit_mask(site: Site, units: Tensor | Sequence[int]) -> Tensor:
    count = site.require_num_units()
    chosen = torch.as_tensor(units)
    if chosen.dtype == torch.bool:
        if chosen.shape != (count,):
            raise ValueError(f"The mask of site {site.name!r} must have {count} entries, got {tuple(chosen.shape)}.")
        return chosen
    chosen = chosen.long()
    if chosen.ndim != 1 or (len(chosen) and (int(chosen.min()) < 0 or int(chosen.max()) >= count)):
        raise ValueError(f"Units of site {site.name!r} must be indices in 0 … {count - 1}.")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen.cpu()] = True
    return mask


def _changes(site: Site, mask: Tensor) -> list[_Change]:
    owner = unit_of_weight(site)
    mask = mask.to(owner.device)
    parts = [_Change(site.module, "weight", mask[owner])]
    bias = getattr(site.module, "bias", None)
    if site.side == "output" and isinstance(bias, Tensor):
        parts.append(_Change(site.module, "bias", mask))
    return parts


def _find_reference(
    changes: Mapping[str, list[_Change]], names: Mapping[int, str], reference: Mapping[str, Tensor] | None
) -> dict[int, Tensor]:
    if reference is None:
        raise ValueError("The intervention 'rewind' needs `reference_state`, the state_dict of an earlier checkpoint.")
    found = {}
    for part in (p for parts in changes.values() for p in parts):
        parameter = getattr(part.module, part.name)
        name = names.get(id(parameter), "?")
        value = reference.get(name)
        if value is None or value.shape != parameter.shape:
            raise ValueError(f"`reference_state` has no {name!r} of shape {tuple(parameter.shape)} to rewind to.")
        found[id(parameter)] = value
    return found


def _set_mean(site: Site, mask: Tensor, mean: Tensor, undo: Undo) -> None:
    """Zero the unit's weights and add what its mean gave to the bias that comes next."""
    module: Any = site.module
    weight: Tensor = module.weight
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        raise ValueError(f"'mean' is for convolution and linear layers, not {type(module).__name__}; use 'zero'.")
    channels = mask.repeat_interleave(site.channels_per_unit).to(weight.device)
    mean = mean.detach().to(weight).reshape(-1)
    if mean.shape != channels.shape:
        raise ValueError(f"`means` of site {site.name!r} must have {len(channels)} entries, got {len(mean)}.")
    if site.side == "input" and isinstance(module, nn.modules.conv._ConvNd):
        raise ValueError(
            f"'mean' at the input of a convolution ({site.name!r}) would differ at padded borders; name the layer "
            "before it."
        )
    change = _changes(site, mask)[0]
    if module.bias is None:
        outputs = module.out_channels if isinstance(module, nn.modules.conv._ConvNd) else module.out_features
        module.bias = nn.Parameter(weight.new_zeros(outputs))
        undo.added_bias(module)
    bias: Tensor = module.bias
    undo.save(bias, torch.ones_like(bias, dtype=torch.bool))
    if site.side == "output":
        bias[channels] = mean[channels]
    else:
        bias += weight[:, channels] @ mean[channels]
    undo.save(weight, change.mask)
    weight[change.mask] = 0


def _noise(parameter: Tensor, part: _Change, sigma: float | None, generator: torch.Generator | None) -> Tensor:
    return _normal(int(part.mask.sum()), parameter, float(parameter.std()) if sigma is None else sigma, generator)


def _normal(count: int, like: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    if not sigma >= 0:
        raise ValueError(f"sigma must be at least 0, got {sigma}.")
    return (torch.randn(count, generator=generator, device=like.device) * sigma).to(like.dtype)
