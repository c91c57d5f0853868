r"""Rewind the units whose learned change hurts examples that the network did not train on.

With the weights W⁰ before training, W¹ after it, and a loss L on unseen minority examples, the learned change of unit u
is worth

.. math:: I(u) = -\frac12 \sum_{a \in \{1/4,\,3/4\}}
   \bigl\langle \nabla_{W_u} L\bigl(W^0 + a\,(W^1 - W^0)\bigr),\; W^1_u - W^0_u \bigr\rangle,

a two-point integral of the loss along the straight path.  I(u) > 0: what the unit learned lowers the loss; I(u) < 0: it
does *harm*.  Over all units I adds up to L(W⁰) − L(W¹), exactly so for a quadratic loss.

A unit is an output channel of a convolution or a row of a linear layer, with its bias and, where a batch or group norm
follows directly, the norm's weight and bias (and running statistics) of that channel.

Source: own; path integrals of this kind are integrated gradients (Sundararajan et al. 2017), over inputs, and loss
change allocation (Lan et al. 2019), over the training trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demem.batch import Batch, apply_model
from demem.linear import balanced_weights
from demem.removal.interventions import Undo, Units, apply
from demem.sites import Site, find_head, first_tensor, named_layers, own_weight
from demem.tracing import evaluating, top_units, unit_of_weight

Losses = Callable[[nn.Module], Iterable[Tensor]]
"""A model → parts of the loss, which add up to it; each part is differentiated before the next is made."""

POINTS = (0.25, 0.75)
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True, repr=False)
class Harm:
    """What each unit's learned change is worth on unseen examples.

    Attributes:
        scores: ``{layer: (N,)}`` I(u), in the loss's unit (nats for cross-entropy); negative = harmful.
        norms: ``{layer: name of the norm that follows it}``.
    """

    scores: Mapping[str, Tensor]
    norms: Mapping[str, str]

    def most_harmful(self, share: float = 1.0) -> dict[str, Tensor]:
        """Indices of the most harmful units, at most this fraction of all units and harmful ones only.

        Raises:
            ValueError: ``share`` is not in (0, 1], or a score is NaN.
        """
        chosen = top_units({name: -score for name, score in self.scores.items()}, float(share))
        harmful = {name: units[self.scores[name][units] < 0] for name, units in chosen.items()}
        return {name: units for name, units in harmful.items() if len(units)}

    def concentration(self, share: float) -> float:
        """Fraction of all harm that the most harmful units hold, ``share`` of all units; NaN without harm."""
        harm = torch.cat([(-s).clamp_min(0).flatten().double().cpu() for s in self.scores.values()])
        held = harm.sort(descending=True).values[: max(1, round(share * len(harm)))].sum()
        return float(held / harm.sum())

    def __repr__(self) -> str:
        total = sum(map(len, self.scores.values()))
        harmful = sum(int((s < 0).sum()) for s in self.scores.values())
        gain, harm = (sum(float((sign * s).clamp_min(0).sum()) for s in self.scores.values()) for sign in (1, -1))
        return (
            f"Harm({harmful} of {total} units in {len(self.scores)} layers are harmful: +{harm:.3f}, the others "
            f"−{gain:.3f}; 1% of the units hold {self.concentration(0.01):.0%} of the harm, 10% "
            f"{self.concentration(0.1):.0%})"
        )


def balanced_losses(batches: Iterable[Batch]) -> Losses:
    """Cross-entropy on some examples, every class counting the same, batch by batch.

    Args:
        batches: kept in memory, e.g. the inferred minority of a held-out slice.

    >>> model = nn.Linear(2, 2)
    >>> batch = Batch(torch.randn(6, 2), torch.tensor([0, 0, 0, 0, 1, 1]))
    >>> one, several = balanced_losses([batch]), balanced_losses([Batch(x, y) for x, y in zip(batch.x.split(2),
    ...     batch.y.split(2))])
    >>> torch.allclose(sum(one(model)), sum(several(model)))
    True
    """
    kept = list(batches)
    weights = balanced_weights(torch.cat([batch.y for batch in kept]))
    parts = torch.split(weights / weights.sum(), [len(batch.y) for batch in kept])

    def losses(model: nn.Module) -> Iterator[Tensor]:
        for batch, weight in zip(kept, parts, strict=True):
            yield (weight * F.cross_entropy(apply_model(model, batch.x), batch.y, reduction="none")).sum()

    return losses


def rewindable_sites(model: nn.Module, head: str | None = None) -> list[Site]:
    """Output sides of all convolution and linear layers but the head, whose learned change can be rewound.

    >>> [site.name for site in rewindable_sites(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))]
    ['0']
    """
    head_layer = find_head(model, head)[1]
    layers = {
        name: layer
        for name, layer in named_layers(model).items()
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and isinstance(layer.weight, nn.Parameter)
    }
    return [
        Site(name, layer, "output", layer.weight.shape[0] if isinstance(layer, nn.Linear) else layer.out_channels)
        for name, layer in layers.items()
        if layer is not head_layer
    ]


def harm_scores(
    model: nn.Module,
    before: Mapping[str, Tensor],
    losses: Losses,
    sites: Sequence[Site] | None = None,
    points: Sequence[float] = POINTS,
) -> Harm:
    """Score each unit's learned change by its path integral (see the module docstring).

    The weights of the sites and of the norms that follow them move along the path, all together; the head, and what
    else is not part of a unit, stays as trained.  The model is in evaluation mode meanwhile and is afterwards what it
    was, bit for bit.

    Args:
        model: as trained, W¹.
        before: its ``state_dict`` before training, W⁰.
        losses: on unseen minority examples, e.g. :func:`balanced_losses`.
        sites: default :func:`rewindable_sites`.
        points: a, fractions of the path; the mean over them is taken.

    Raises:
        ValueError: ``before`` lacks a weight, a site is no layer's output, there are no points, or a score is not
            finite.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> before = {name: value.clone() for name, value in model.state_dict().items()}
    >>> _ = model[0].weight.data.normal_()
    >>> batch = Batch(torch.randn(8, 2), torch.arange(8) % 2)
    >>> harm_scores(model, before, balanced_losses([batch])).scores["0"].shape
    torch.Size([3])
    """
    sites = rewindable_sites(model) if sites is None else list(sites)
    for site in sites:
        own_weight(site)
        if site.side != "output":
            raise ValueError(f"Harm is that of units a layer makes: name an output, not {site.name!r}.")
    if not sites or not points:
        raise ValueError("harm_scores needs at least one site and one point.")
    norms = following_norms(model, sites, losses)
    parts = {site.name: [site, *([norms[site.name]] if site.name in norms else [])] for site in sites}
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    parameters = {_name(names, p, part): p for several in parts.values() for part in several for p in _own(part)}
    start = {name: _before(before, name, p) for name, p in parameters.items()}
    moved = [(p, start[name]) for name, p in parameters.items()] + _moved_statistics(model, norms.values(), before)
    gradient = _mean_gradient(model, losses, parameters, moved, points)
    scores = {}
    for name, several in parts.items():
        worth = torch.zeros(several[0].require_num_units(), device=own_weight(several[0]).device)
        for part in several:
            for p in _own(part):
                key = names[id(p)]
                product = gradient[key].float() * (p.detach() - start[key]).float()
                owner = unit_of_weight(part) if p.ndim > 1 else torch.arange(len(p), device=p.device)
                worth.index_add_(0, owner.reshape(-1), product.reshape(-1), alpha=-1)
        if not bool(torch.isfinite(worth).all()):
            raise ValueError(
                f"The loss has no finite gradient at {name!r} on the way from `before` to the trained weights. Score "
                "in float32, and check the examples and both sets of weights for NaN."
            )
        scores[name] = worth
    return Harm(scores, {name: norm.name for name, norm in norms.items()})


def _mean_gradient(
    model: nn.Module,
    losses: Losses,
    parameters: Mapping[str, nn.Parameter],
    moved: Sequence[tuple[Tensor, Tensor]],
    points: Sequence[float],
) -> dict[str, Tensor]:
    """Gradient with respect to the parameters, averaged over points of a path.  On it the tensors of ``moved``, pairs
    of a tensor of the model and its start, go from the start to what they are now."""
    gradient = {name: torch.zeros_like(p) for name, p in parameters.items()}
    end = [value.detach().clone() for value, _ in moved]

    @torch.no_grad()
    def move_to(point: float) -> None:
        for (value, first), last in zip(moved, end, strict=True):
            value.copy_(last if point == 1 else torch.lerp(first, last, point))

    with evaluating(model, freeze=False), torch.enable_grad():
        try:
            for point in points:
                move_to(point)
                for loss in losses(model):
                    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                    for name, value in zip(parameters, found, strict=True):
                        if value is not None:
                            gradient[name] += value / len(points)
        finally:
            move_to(1.0)
    return gradient


def rewind(
    model: nn.Module,
    before: Mapping[str, Tensor],
    units: Units,
    norms: Mapping[str, str] | None = None,
    amount: float = 1.0,
) -> Undo:
    """Take back what units learned: W_u := W¹_u + amount · (W⁰_u − W¹_u).

    Args:
        model: as trained, changed in place.
        before: its ``state_dict`` before training.
        units: ``{layer: indices or mask}``, e.g. :meth:`Harm.most_harmful`.
        norms: :attr:`Harm.norms`; the norms' parameters and running statistics of these channels go back, too.
        amount: fraction of the change taken back, in [0, 1].

    Returns:
        a function without arguments that undoes it, bit for bit.

    Raises:
        ValueError: unknown layer or unit, a weight that ``before`` lacks, or ``amount`` out of range.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> before = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    >>> undo = rewind(model, before, {"0": [1]})
    >>> model[0].weight.ne(0).all(1)
    tensor([ True, False,  True])
    >>> undo()
    >>> bool(model[0].weight.ne(0).all())
    True
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount is the fraction of the change that is taken back, in [0, 1]; got {amount}.")
    layers, norms = named_layers(model), norms or {}
    unknown = sorted({*units, *(norms[name] for name in units if name in norms)} - set(layers))
    if unknown:
        raise ValueError(f"Units are given for {unknown}, which the model does not have.")
    sites = {name: Site(name, layers[name], "output", _width(layers[name])) for name in units}
    wanted = dict(units)
    for name in units:
        if name in norms:
            norm = norms[name]
            sites[norm] = Site(norm, layers[norm], "output", _width(layers[name]))
            if getattr(layers[norm], "weight", None) is not None:
                wanted[norm] = units[name]
    after = model.state_dict()
    target = {
        name: torch.lerp(after[name].detach(), value.to(after[name]), amount)
        for name, value in before.items()
        if name in after and value.shape == after[name].shape and after[name].is_floating_point()
    }
    undo = apply(model, list(sites.values()), wanted, "rewind", reference_state=target)
    try:
        names = {id(b): name for name, b in model.named_buffers(remove_duplicate=False)}
        with torch.no_grad():
            for name in units:
                for buffer in _statistics(layers[norms[name]]) if name in norms else []:
                    mask = _mask(units[name], len(buffer)).to(buffer.device)
                    undo.save(buffer, mask)
                    buffer[mask] = target[names[id(buffer)]][mask]
    except BaseException:
        undo()
        raise
    return undo


def following_norms(model: nn.Module, sites: Sequence[Site], losses: Losses) -> dict[str, Site]:
    """``{layer: the batch or group norm that reads its output directly}``, as a forward pass finds them."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that their ids stay theirs
    found: dict[str, Site] = {}
    handles = []

    def keep(site: Site) -> Callable[..., None]:
        return lambda module, args, output: made.__setitem__(id(output), (site.name, output))

    def look(name: str, norm: nn.Module) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[object, ...]) -> None:
            layer, _ = made.get(id(first_tensor(args)), (None, None))
            if layer is not None:
                found[layer] = Site(name, norm, "output", _width(norm))

        return seen

    for site in sites:
        handles.append(site.module.register_forward_hook(keep(site)))
    for name, module in named_layers(model).items():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            handles.append(module.register_forward_pre_hook(look(name, module)))
    try:
        with evaluating(model), torch.no_grad():
            for _ in losses(model):
                break
    finally:
        for handle in handles:
            handle.remove()
    return found


def _width(layer: nn.Module) -> int:
    for name in ("out_channels", "out_features", "num_features", "num_channels"):
        if isinstance(getattr(layer, name, None), int):
            return int(getattr(layer, name))
    raise ValueError(f"A {type(layer).__name__} has no units that can be rewound; name convolution and linear layers.")


def _own(site: Site) -> list[nn.Parameter]:
    values = (getattr(site.module, name, None) for name in ("weight", "bias"))
    return [value for value in values if isinstance(value, nn.Parameter)]


def _statistics(norm: nn.Module) -> list[Tensor]:
    values = (norm._buffers.get(name) for name in _STATISTICS)
    return [value for value in values if value is not None]


def _moved_statistics(
    model: nn.Module, norms: Iterable[Site], before: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Running statistics of the norms, and what they were."""
    names = {id(buffer): name for name, buffer in model.named_buffers(remove_duplicate=False)}
    buffers = [buffer for norm in norms for buffer in _statistics(norm.module)]
    return [(buffer, _before(before, names[id(buffer)], buffer)) for buffer in buffers]


def _name(names: Mapping[int, str], parameter: nn.Parameter, site: Site) -> str:
    if id(parameter) not in names:
        raise ValueError(f"Site {site.name!r} does not belong to this model.")
    return names[id(parameter)]


def _before(before: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    value = before.get(name)
    if value is None or value.shape != like.shape:
        raise ValueError(
            f"`before` has no {name!r} of shape {tuple(like.shape)}; pass the model's earlier state_dict()."
        )
    return value.detach().to(like)


def _mask(units: Tensor | Sequence[int], size: int) -> Tensor:
    chosen = torch.as_tensor(units).cpu()
    return (
        chosen
        if chosen.dtype == torch.bool
        else torch.zeros(size, dtype=torch.bool).index_fill_(0, chosen.long(), True)
    )
