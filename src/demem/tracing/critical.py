"""Count the units that must be removed to flip a prediction (Maini et al. 2023, the search for critical neurons)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from demem.batch import Batch, apply_model
from demem.sites import Site
from demem.tracing.capture import evaluating, select_rows


class CriticalUnits(NamedTuple):
    """Result of :func:`critical_units`.

    Attributes:
        removed: ``(S,)`` number of units removed until the prediction differed from the label; ``cap + 1`` where the
            cap was not enough, 0 for examples that were misclassified before.
        units: ``(S, cap)`` the units in the order of removal, numbered through all sites, −1 for none.
        offsets: ``{site: number of its first unit}``.
    """

    removed: Tensor
    units: Tensor
    offsets: dict[str, int]


def critical_units(model: nn.Module, sites: Sequence[Site], batch: Batch, cap: int = 20) -> CriticalUnits:
    r"""Set units to zero one by one, separately for each example, until its prediction flips.

    Every step removes the unit with the largest first-order rise of the example's own loss,
    :math:`-\sum_p a \,\partial L / \partial a`, with the gradient of the network without the units removed before.
    For a unit without bias this equals minus the paper's :math:`\sum w\,\partial L/\partial w` over the unit's weights:
    with :math:`a = w \cdot x`, :math:`\sum_j w_j\,\partial L/\partial w_j = \partial L/\partial a \sum_j w_j x_j`.
    All examples of the batch take a step together; those that have flipped are not run again.

    Args:
        model: any module; run in evaluation mode and left as it was.
        sites: sites whose units may be removed.
        batch: as many examples as fit in memory.
        cap: remove at most this many units from one example.

    Returns:
        See :class:`CriticalUnits`.

    Raises:
        ValueError: ``cap`` is not positive.
        RuntimeError: a site's layer did not run.

    Source: Maini et al. 2023.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(3, 2, bias=False))
        >>> model[0].weight.data = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.5, 0.0]])
        >>> batch = Batch(torch.tensor([[3.0, 0.5, 0.0], [0.0, 1.0, 2.0], [-1.0, 0.0, 0.0]]), torch.tensor([0, 0, 0]))
        >>> found = critical_units(model, find_sites(model, "0"), batch, cap=2)
        >>> found.removed.tolist(), found.units[:2].tolist()
        ([1, 1, 0], [[0, -1], [0, -1]])
    """
    if cap < 1:
        raise ValueError(f"cap must be positive, got {cap}.")
    total = len(batch.y)
    device = batch.y.device
    count = torch.zeros(total, dtype=torch.long, device=device)
    history = torch.full((total, cap), -1, dtype=torch.long, device=device)
    with evaluating(model):
        gates = _ExampleGates(sites)
        with gates:
            active = torch.arange(total, device=device)
            for step in range(cap + 1):
                part = batch if len(active) == total else select_rows(batch, active)
                gates.start(active)
                # The last step needs no gradient, because it only checks whether the cap was enough.
                with torch.set_grad_enabled(step < cap):
                    logits = apply_model(model, part.x).float()
                    missing = [s.name for s in sites if s.name not in gates.offsets]
                    if missing:
                        raise RuntimeError(f"These layers did not run in the forward pass: {', '.join(missing)}.")
                    still = logits.argmax(1) == part.y
                    last = step == min(cap, gates.total)
                    if not last and bool(still.any()):
                        F.cross_entropy(logits, part.y, reduction="sum").backward()  # type: ignore[no-untyped-call]
                        rise = gates.rise()
                        best = rise.argmax(1)
                        ahead = active[still]
                        history[ahead, step] = best[still]
                        gates.remove(ahead, best[still])
                active = active[still]
                count[active] = cap + 1 if last else step + 1
                if last or not len(active):
                    break
        offsets = gates.offsets
    return CriticalUnits(count, history, offsets)


class _ExampleGates:
    """A gate g for every unit and example, and its gradient: ∂L/∂g = Σ_p a ∂L/∂a at g = 1."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        self.offsets: dict[str, int] = {}
        self.total = 0  # units, known after the first forward pass
        self._removed: dict[str, list[tuple[Tensor, Tensor]]] = {s.name: [] for s in sites}
        self._gates: dict[str, Tensor] = {}
        self._active = torch.empty(0)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self._handles += [site.hook(partial(self._gate, site)) for site in self.sites]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def start(self, active: Tensor) -> None:
        self._active = active
        self._gates = {}

    def _gate(self, site: Site, tensor: Tensor) -> Tensor:
        axis = site.unit_axis(tensor)
        units = tensor.shape[axis] // site.channels_per_unit
        gate = self._gates.get(site.name)
        if gate is None:
            gate = torch.ones(len(self._active), units, device=tensor.device)
            if site.name not in self.offsets:
                self.offsets[site.name] = self.total
                self.total += units
            for example, unit in self._removed[site.name]:
                hit = (self._active[:, None] == example[None]).nonzero()
                gate[hit[:, 0], unit[hit[:, 1]]] = 0
            gate.requires_grad_(torch.is_grad_enabled())
            self._gates[site.name] = gate
        wide = gate.repeat_interleave(site.channels_per_unit, 1) if site.channels_per_unit > 1 else gate
        shape = [1] * tensor.ndim
        shape[0], shape[axis] = len(self._active), tensor.shape[axis]
        factor = site.examples_first(wide.to(tensor.dtype).view(shape))  # its own inverse: it swaps two axes
        return tensor * factor

    def rise(self) -> Tensor:
        """Compute the first-order rise of the loss if a unit is removed too, ``(A, units)``; −∞ for removed units."""
        columns = []
        for name in sorted(self.offsets, key=lambda n: self.offsets[n]):
            gate = self._gates[name]
            gradient = gate.grad if gate.grad is not None else torch.zeros_like(gate)
            columns.append((-gradient).masked_fill(gate.detach() == 0, float("-inf")))
        return torch.cat(columns, 1)

    def remove(self, examples: Tensor, units: Tensor) -> None:
        for site in self.sites:
            first = self.offsets[site.name]
            size = self._gates[site.name].shape[1]
            here = (units >= first) & (units < first + size)
            if bool(here.any()):
                self._removed[site.name].append((examples[here], units[here] - first))
