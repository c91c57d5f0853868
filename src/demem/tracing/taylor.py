"""First-order estimate of what ablating each unit does to each example's loss, in one forward and one backward pass."""

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
    r"""Estimated rise of each example's loss when a unit is set to zero (or to its mean) everywhere.

    .. math:: \Delta L_{si} \approx -\sum_p (a_{sip} - c_i)\, \partial L_s / \partial a_{sip}

    with :math:`p` over space or tokens and :math:`c_i` zero or the unit's mean over examples and positions (Molchanov
    et al. 2017).  Weight gradients are not computed, which makes it cheaper than a training step.

    Args:
        model: any module; run in evaluation mode and left as it was.
        sites: from :func:`demem.sites.find_sites`.
        batches: examples; one pass.
        ablate: what the unit is set to.
        ranks: of a distributed run, for the mean.

    Returns:
        ``{site: (S, N)}`` float32 in nats, positive = the unit helps the example.

    Raises:
        ValueError: no examples, a site's layer runs under ``torch.no_grad()``, or activations or gradients that are
            not finite.
        RuntimeError: a site's layer did not run.
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
    """Hooks that multiply every site's activation with its gradient as soon as the backward pass reaches it."""

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
        # A copy, because an in-place activation that follows would rewrite what was read.
        kept = site.examples_first(tensor.detach().clone())
        axis = site.unit_axis(tensor)
        if len(kept) != self._size:
            raise ValueError(
                f"Site {site.name!r} has {len(kept)} rows for {self._size} examples, so its scores cannot be told "
                "apart by example."
            )
        first_time = site.name not in self._ran
        self._ran.add(site.name)
        device = tensor.device
        if first_time:  # the rows of this batch; a shared layer adds to them at every call
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
        # Nothing before this layer asks for a gradient: start the graph here.
        tensor = tensor.detach().requires_grad_().clone()
        tensor.register_hook(on_gradient)  # type: ignore[no-untyped-call]
        return tensor
