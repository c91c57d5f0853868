"""Estimate the effect of ablating each unit on each example's loss to first order, in one backward pass.

Ablation moves the unit's activation at position p from a_p to c.  With L the loss of the example as a function of these
activations, Taylor's theorem gives

    L(a + (c − a)) − L(a) = Σ_p (c − a_p) ∂L/∂a_p + O(‖c − a‖²).

The backward pass yields ∂L/∂a for all units at once.  For c = 0 the sum Σ_p a_p ∂L/∂a_p is enough; the mean c is known
only after all batches, so Σ_p ∂L/∂a_p is kept as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from demem.batch import Batch, apply_model
from demem.sites import Site, check_finite
from demem.tracing.capture import ALONE, Ranks, evaluating, per_unit

Ablate = Literal["zero", "mean"]


def taylor_impact(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    ablate: Ablate = "zero",
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    r"""Estimate the rise of each example's loss when a unit is set to zero (or to its mean) at all positions.

    .. math:: \Delta L_{si} \approx -\sum_p (a_{sip} - c_i)\, \partial L_s / \partial a_{sip}

    with :math:`p` over space or tokens and :math:`c_i` zero or the unit's mean over examples and positions.  Weight
    gradients are not computed, so it takes less time than a training step.

    Args:
        model: any module; run in evaluation mode and left as it was.
        sites: from :func:`demem.sites.find_sites`.
        batches: examples; read once.
        ablate: set the unit to ``"zero"``, or to its ``"mean"``.
        ranks: processes of a distributed run, for the mean.

    Returns:
        ``{site: (S, N)}`` float32 in nats, positive = the unit helps the example.

    Raises:
        ValueError: no examples, a site's layer runs under ``torch.no_grad()``, or activations or gradients that are
            not finite.
        RuntimeError: a site's layer did not run.

    Source: Molchanov et al. 2017, there averaged over examples and in absolute value.

    Example:
        >>> from demem.sites import find_sites
        >>> from demem.tracing import ablation_impact
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> sites, batch = find_sites(model, "1"), Batch(torch.randn(50, 4), torch.arange(50) % 2)
        >>> estimate, exact = (f(model, sites, [batch])["1"] for f in (taylor_impact, ablation_impact))
        >>> float(torch.corrcoef(torch.stack([estimate.flatten(), exact.flatten()]))[0, 1]) > 0.98
        True
    """
    if ablate not in ("zero", "mean"):
        raise ValueError(f"Unknown ablation {ablate!r}; use 'zero' or 'mean'.")
    recorder = _Recorder(sites, keep_gradient=ablate == "mean")
    count = 0
    with evaluating(model), torch.enable_grad(), recorder:
        for batch in batches:
            recorder.start(len(batch.y))
            logits = apply_model(model, batch.x)
            recorder.require_all()
            F.cross_entropy(logits.float(), batch.y, reduction="sum").backward()  # type: ignore[no-untyped-call]
            count += len(batch.y)
    if not count:
        raise ValueError("There are no examples to trace.")
    impact = {}
    for site in sites:
        value = -torch.cat(recorder.products[site.name])
        if ablate == "mean":
            positions = ranks.total(recorder.positions[site.name])
            mean = ranks.total(recorder.sums[site.name]) / positions
            value = value + torch.cat(recorder.gradients[site.name]) * mean.float()
        impact[site.name] = check_finite(per_unit(site, value), f"the Taylor scores of site {site.name!r}")
    return impact


class _Recorder:
    """Hooks that multiply every site's activation by its gradient when the backward pass reaches it."""

    def __init__(self, sites: Sequence[Site], keep_gradient: bool) -> None:
        self.sites = sites
        self.keep_gradient = keep_gradient
        self.products: dict[str, list[Tensor]] = {s.name: [] for s in sites}
        self.gradients: dict[str, list[Tensor]] = {s.name: [] for s in sites}
        self.sums: dict[str, Tensor] = {}
        self.positions: dict[str, Tensor] = {}
        self._ran: set[str] = set()
        self._size = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> _Recorder:
        self._handles += [site.hook(partial(self._watch, site)) for site in self.sites]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def start(self, size: int) -> None:
        self._ran.clear()
        self._size = size

    def require_all(self) -> None:
        missing = [s.name for s in self.sites if s.name not in self._ran]
        if missing:
            raise RuntimeError(f"These layers did not run in the forward pass: {', '.join(missing)}.")

    def _watch(self, site: Site, tensor: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            raise ValueError(
                f"Site {site.name!r} runs under torch.no_grad() in the model's forward, so no gradient reaches it. "
                "Freeze layers with requires_grad_(False) instead, name a later layer, or use the score 'ablation'."
            )
        # A copy, because an in-place activation that follows would rewrite it.
        kept = site.examples_first(tensor.detach().clone())
        axis = site.unit_axis(tensor)
        if len(kept) != self._size:
            raise ValueError(
                f"Site {site.name!r} has {len(kept)} rows for {self._size} examples, so its scores cannot be assigned "
                "to examples."
            )
        first_time = site.name not in self._ran
        self._ran.add(site.name)
        device = tensor.device
        if first_time:  # a shared layer is called again and adds to the same rows
            channels = tensor.shape[axis]
            self.products[site.name].append(torch.zeros(self._size, channels, device=device))
            if self.keep_gradient:
                self.gradients[site.name].append(torch.zeros(self._size, channels, device=device))
        product = self.products[site.name][-1]
        gradient = self.gradients[site.name][-1] if self.keep_gradient else None
        over = [d for d in range(1, kept.ndim) if d != axis % kept.ndim]
        if self.keep_gradient:
            total = kept.sum([0, *over], dtype=torch.double)
            positions = torch.tensor(float(kept.numel() // kept.shape[axis]), device=device, dtype=torch.double)
            self.sums[site.name] = self.sums.get(site.name, 0) + total
            self.positions[site.name] = self.positions.get(site.name, 0) + positions

        def on_gradient(grad: Tensor) -> None:
            grad = site.examples_first(grad)
            moved = (kept * grad).float()
            product.add_(moved.sum(over) if over else moved)
            if gradient is not None:
                gradient.add_(grad.float().sum(over) if over else grad.float())

        if tensor.requires_grad:
            tensor.register_hook(on_gradient)  # type: ignore[no-untyped-call]
            return None
        # Nothing before this layer requires a gradient, so the graph starts here.
        tensor = tensor.detach().requires_grad_().clone()
        tensor.register_hook(on_gradient)  # type: ignore[no-untyped-call]
        return tensor
