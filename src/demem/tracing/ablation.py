"""Exact ablation: the loss of each example when a unit is set to zero or to its mean and the network runs on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demem.batch import Batch, apply_model
from demem.sites import Site
from demem.tracing.atypical import margins
from demem.tracing.capture import ALONE, Ranks, evaluating
from demem.tracing.narrow import CannotRestart
from demem.tracing.restart import Restart
from demem.tracing.taylor import Ablate

Effect = Literal["loss", "margin", "accuracy"]


def ablation_impact(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    units: Mapping[str, Tensor] | None = None,
    ablate: Ablate = "zero",
    effect: Effect = "loss",
    fast: bool = True,
    max_rows: int = 2048,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Measure the effect on each example of ablating units, one unit at a time.

    The network is restarted from the ablated unit (:mod:`demem.tracing.restart`); where it cannot be traced, the whole
    network is run for every unit.

    Args:
        model: any module; run in evaluation mode and left as it was.
        sites: from :func:`demem.sites.find_sites`.
        batches: examples; read once for zero and twice for mean ablation.
        units: ``{site: int64 indices}`` to ablate only these; all units of all sites if ``None``.
        ablate: set the unit to ``"zero"``, or to its ``"mean"`` over examples and positions.
        effect: ``"loss"``: rise of the cross-entropy in nats; ``"margin"``: fall of the margin in logits;
            ``"accuracy"``: 1 where a correct prediction becomes wrong, −1 where a wrong one becomes correct, else 0.
        fast: ``False`` runs the whole network once per unit.
        max_rows: compute at most this many examples × units together; a smaller number takes less memory.
        ranks: processes of a distributed run, for the mean.

    Returns:
        ``{site: (S, N)}``, or ``(S, len(units[site]))`` in the order given; positive = the unit helps the example.

    Raises:
        ValueError: no examples, or an unknown option.
        RuntimeError: a site's layer did not run.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> model[0].weight.data = torch.eye(2)
        >>> batch = Batch(torch.tensor([[3.0, 0.0], [1.0, 2.0]]), torch.tensor([0, 0]))
        >>> ablation_impact(model, find_sites(model, "0"), [batch], effect="margin")  # unit 1 fails the second example
        {'0': tensor([[ 3.,  0.],
                      [ 1., -2.]])}
    """
    if effect not in ("loss", "margin", "accuracy") or ablate not in ("zero", "mean"):
        raise ValueError(f"Unknown effect {effect!r} or ablation {ablate!r}.")
    if units is not None:
        sites = [site for site in sites if site.name in units]
    batches = batches if isinstance(batches, Sequence) else list(batches)
    if not batches:
        raise ValueError("There are no examples to trace.")
    results: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    with evaluating(model), torch.no_grad():
        known = all(site.num_units is not None for site in sites)
        if ablate == "mean" or not known:
            widths, means = _channel_means(model, sites, batches, ranks)
        else:
            widths, means = {s.name: s.require_num_units() * s.channels_per_unit for s in sites}, {}
        plans = _plan(model, sites, batches[0].x) if fast else [(None, list(sites))]
        for batch in batches:
            for restart, members in plans:
                before = restart.forward(batch.x) if restart else apply_model(model, batch.x)
                before = before.float()
                for site in members:
                    width = widths[site.name] // site.channels_per_unit
                    chosen = torch.arange(width) if units is None else units[site.name].cpu()
                    centre = means[site.name].view(width, -1) if ablate == "mean" else None
                    after = _ablate_site(model, restart, site, batch, chosen, centre, max_rows)
                    results[site.name].append(_effect(effect, before, after, batch.y))
                if restart:
                    restart.forget()
    return {name: torch.cat(parts) for name, parts in results.items()}


def _ablate_site(
    model: nn.Module,
    restart: Restart | None,
    site: Site,
    batch: Batch,
    units: Tensor,
    centre: Tensor | None,
    max_rows: int,
) -> Tensor:
    """Compute the logits ``(U, B, C)`` with each of ``units (U,)`` ablated."""
    parts = []
    at_once = max(1, restart.rows_at_once(site, max_rows) // len(batch.y)) if restart else 1
    for chunk in torch.split(units.to(batch.y.device), at_once) if len(units) else ():
        mean = None if centre is None else centre[chunk]
        if restart is not None:
            parts.append(restart.ablated(site, chunk, mean))
        else:
            with set_unit(site, int(chunk), None if mean is None else mean[0]):
                parts.append(apply_model(model, batch.x)[None])
    return torch.cat(parts).float() if parts else torch.empty(0, len(batch.y), 2, device=batch.y.device)


class set_unit:
    """Context manager that sets one unit of a site to zero (or to ``value``) for every example.

    Args:
        site: from :func:`demem.sites.find_sites`.
        unit: index of the unit.
        value: ``(channels_per_unit,)``; zero if ``None``.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> with set_unit(find_sites(model, "0")[0], unit=1):
        ...     model(torch.randn(2, 4))[:, 1]
        tensor([0., 0.], grad_fn=...)
    """

    def __init__(self, site: Site, unit: int, value: Tensor | None = None) -> None:
        self.site, self.unit, self.value = site, unit, value
        self._handle: Any = None

    def __enter__(self) -> None:
        self._handle = self.site.hook(self._edit)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _edit(self, activation: Tensor) -> Tensor:
        tensor = activation.clone()
        axis, k = self.site.unit_axis(tensor), self.site.channels_per_unit
        part = tensor.narrow(axis, self.unit * k, k)
        if self.value is None:
            part.zero_()
        else:
            part.copy_(self.value.to(part).view(-1, *[1] * (-1 - axis)).expand_as(part))
        return tensor


def _effect(effect: Effect, before: Tensor, after: Tensor, y: Tensor) -> Tensor:
    """Compute the effect ``(B, U)`` from logits ``(B, C)`` before and ``(U, B, C)`` after."""
    count, size = after.shape[:2]
    labels = y.repeat(count)
    flat = after.flatten(0, 1)
    if not count:
        return before.new_zeros(size, 0)
    if effect == "loss":
        loss = F.cross_entropy(flat, labels, reduction="none").view(count, size)
        return (loss - F.cross_entropy(before, y, reduction="none")).t()
    if effect == "margin":
        return (margins(before, y) - margins(flat, labels).view(count, size)).t()
    right = (flat.argmax(1) == labels).view(count, size).float()
    return ((before.argmax(1) == y).float() - right).t()


def _plan(model: nn.Module, sites: Sequence[Site], x: Any) -> list[tuple[Restart | None, list[Site]]]:
    """Trace the model; returns restarts with the sites that each serves, and ``None`` with those that are run whole."""
    plain = [s for s in sites if next(s.module.children(), None) is None]
    nested = [s for s in sites if s not in plain]
    plans: list[tuple[Restart | None, list[Site]]] = []
    whole: list[Site] = []
    # A composite layer (a block) that is a site must not be traced into, which hides the layers inside it: it gets a
    # trace of its own.
    for members in [plain, *[[s] for s in nested]]:
        if not members:
            continue
        try:
            if not isinstance(x, Tensor):
                raise CannotRestart("The input is not a single tensor.")
            plans.append((Restart(model, members, x), members))
        except CannotRestart:
            whole.extend(members)
    return [*plans, (None, whole)] if whole else plans


def _channel_means(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], ranks: Ranks
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Compute the number of channels of every site, and the mean of each channel over examples and positions."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    ran: set[str] = set()

    def note(site: Site, tensor: Tensor) -> None:
        axis = site.unit_axis(tensor) % tensor.ndim
        ran.add(site.name)
        sums[site.name] = sums.get(site.name, 0) + tensor.sum(
            [d for d in range(tensor.ndim) if d != axis], dtype=torch.double
        )
        counts[site.name] = counts.get(site.name, 0) + tensor.numel() // tensor.shape[axis]

    handles = [site.hook(partial(note, site)) for site in sites]
    try:
        for batch in batches:
            apply_model(model, batch.x)
    finally:
        for handle in handles:
            handle.remove()
    missing = [s.name for s in sites if s.name not in ran]
    if missing:
        raise RuntimeError(f"These layers did not run in the forward pass: {', '.join(missing)}.")
    means = {
        name: (ranks.total(value) / ranks.total(torch.tensor(float(counts[name]), device=value.device))).float()
        for name, value in sums.items()
    }
    return {name: len(value) for name, value in sums.items()}, means
