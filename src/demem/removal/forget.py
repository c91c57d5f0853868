"""Make the units that know an attribute best forget it within each class, while the network trains.

The penalty is the mutual information of :mod:`demem.removal.information`, averaged over sites, units and classes.  No
loss function is touched: at each site the penalty's gradient with respect to the activation, in closed form from the
batch's pooled activations, is added to the gradient that comes back in the training step's own backward pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from demem.batch import call_model
from demem.removal.information import FLOOR, Moments, attribute_information, group_moments, information_gradient
from demem.sites import Site, eager, find_sites, reduce_activation
from demem.tracing import ALONE, Ranks, top_units

Choose = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""``{site: (N,) scores}`` → ``{site: indices of the units to penalise}``; the same on every process."""


class Probe(NamedTuple):
    """Reads an example's attribute from an activation of the training step's own forward pass.

    Attributes:
        site: the layer that is read.
        attribute: pooled activations ``(B, N)`` of that layer (mean over space or tokens) → attributes ``(B,)``.
    """

    site: Site
    attribute: Callable[[Tensor], Tensor]


class FrozenProbe:
    """Read an example's attribute from a layer as it is now, whatever training does to the layer later.

    A copy of the network in evaluation mode is kept, and run up to the layer.

    Args:
        model: a network, called as ``model(x)``.
        site: the layer that is read, a site of ``model``.
        attribute: see :class:`Probe`.

    >>> model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    >>> probe = FrozenProbe(model, find_sites(model, "0")[0], lambda rows: rows.argmax(1))
    >>> probe(torch.eye(2))
    tensor([0, 1])
    """

    def __init__(self, model: nn.Module, site: Site, attribute: Callable[[Tensor], Tensor]) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        (self.site,) = find_sites(self.model, site.name)
        self.attribute = attribute
        self._read: Tensor | None = None
        self.site.hook(self._stop)

    def __call__(self, x: Any) -> Tensor:
        """Attributes ``(B,)`` of a batch of inputs.

        Raises:
            RuntimeError: the layer did not run.
        """
        self._read = None
        with torch.no_grad(), eager(), suppress(_Reached):
            call_model(self.model, x)
        if self._read is None:
            raise RuntimeError(f"The layer {self.site.name!r} did not run, so the attribute could not be read.")
        return self.attribute(self._read)

    def _stop(self, activation: Tensor) -> None:
        self._read = reduce_activation(self.site, activation, "mean").float()
        raise _Reached


class _Reached(Exception):
    """The layer that was to be read has run."""


@dataclass(frozen=True)
class ForgottenUnit:
    """A unit that was penalised.

    Attributes:
        site, unit: which.
        score: its running mutual information with the attribute within the class, in nats, when it was last chosen.
        steps: in how many steps it was penalised.
    """

    site: str
    unit: int
    score: float
    steps: int


@dataclass(frozen=True, repr=False)
class Forgotten:
    """What :class:`Forgetting` did in a number of steps (an epoch).

    Attributes:
        steps: training steps.
        information: mean over those steps of the penalised units' mutual information in the batch, in nats; NaN where
            no unit was penalised.
        units: the units that were penalised, by site and unit.
        sizes: units of each site.
    """

    steps: int
    information: float
    units: tuple[ForgottenUnit, ...]
    sizes: Mapping[str, int]

    @property
    def share(self) -> float:
        """Fraction of all units that were penalised in at least one step."""
        return len(self.units) / max(1, sum(self.sizes.values()))

    def __repr__(self) -> str:
        total = sum(self.sizes.values())
        lines = [f"Forgotten({len(self.units)} of {total} units in {self.steps} steps, {self.information:.3f} nats)"]
        for site, size in self.sizes.items():
            here = sorted((u for u in self.units if u.site == site), key=lambda u: -u.score)
            best = ", ".join(f"{u.unit} ({u.score:.2f})" for u in here[:5]) + ", …" * (len(here) > 5)
            lines.append(f"  {site}: {len(here)} of {size}" + (f": {best}" if here else ""))
        return "\n".join(lines)


def most_informed(share: float = 0.2) -> Choose:
    """Choose the units of each site that know the attribute best; ``share`` of the site's, at least one.

    >>> most_informed(0.5)({"conv": torch.tensor([0.1, 0.4, 0.3, 0.0])})
    {'conv': tensor([1, 2])}
    """
    return partial(top_units, k=float(share), within=True)


def at_random(share: float = 0.2, seed: int = 0) -> Choose:
    """Choose random units of each site, the same ones each time: the control for :func:`most_informed`.

    >>> len(at_random(0.5)({"conv": torch.zeros(4)})["conv"])
    2
    """

    def choose(scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.rand(len(values), generator=generator) for name, values in scores.items()}
        return top_units(noise, float(share), within=True)

    return choose


class Forgetting:
    r"""Penalise what units know about an attribute, in the backward pass of training steps that are not ours.

    ::

        with Forgetting(sites, num_classes=2) as forgetting:
            for x, y in batches:
                forgetting.observe(y, attribute)     # before the backward pass
                loss(model(x), y).backward()         # any training step
                optimizer.step()
                forgetting.step()                    # after it
        print(forgetting.record())

    Each step is as if

    .. math:: \lambda \cdot \frac1{|S|} \sum_{s \in S} \frac1{|U_s|} \sum_{u \in U_s} I_u

    had been added to the loss, with :math:`I_u` the mutual information of unit u's pooled activation (mean over space
    or tokens) with the attribute, averaged over the classes of the batch in which two attributes occur.  The units
    :math:`U_s` of site s are those with the largest *running* information, from an exponential moving average of each
    group's sums; they are chosen anew every few steps, the first time after that many.

    - One backward pass and no parameter of its own: under DistributedDataParallel the penalty of each process's batch
      is averaged as the loss is.  Pass ``ranks`` there: the running sums of all processes are then added up, just
      before units are chosen, so that all choose the same.
    - Loss scaling and gradient accumulation: pass ``scale`` to :meth:`observe`, what the step multiplies its loss by.
    - Activation checkpointing: the penalty is added, and a batch counted, when the gradient comes back, which happens
      once.  A second backward pass through the same activation (``retain_graph``) adds nothing.
    - A pass without gradients, between :meth:`step` and :meth:`observe`, or with another number of rows than there are
      labels is left alone.  A compiled model runs eagerly meanwhile.

    Measured on digits (last quarter of training, 8 development seeds, worst group of the network as trained): the best
    informed 20%, chosen anew every 5 steps, gained 5.8 ± 1.2 points and touched 92% of the units in all; random 20%,
    drawn as often, 6.3 ± 1.4; all units alike 7.8 ± 1.1; one choice of 20%, made after 25 steps, 1.5 ± 1.6; a fixed
    random 20%, −.4 ± .9.  So nothing shows that the choice matters (``python -m benchmarks units``).

    Attention heads (``:heads``) are penalised channel by channel; a head's information is the mean over its channels.

    Args:
        sites: any; their number of units may be unknown before a forward pass.
        num_classes: C.
        num_attributes: A; default ``num_classes``, for an attribute that is the class another rule would give.
        strength: λ.  3 was used with 2 to 3 sites; from 10 on training was unstable from scratch.
        choose: which units; default :func:`most_informed`.
        every: steps between choices.
        choices: how often units are chosen; with 1 the first choice stays, so that no other unit is ever penalised.
            Default: every time.
        decay: of the moving average, per step.
        floor: ε, see :mod:`demem.removal.information`.
        probe: gives the attribute where :meth:`observe` does not.
        ranks: how the processes of a distributed run are put together.

    Raises:
        ValueError: an argument is out of range.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x, y, attribute = torch.randn(64, 3), torch.arange(64) % 2, torch.arange(64) // 2 % 2
    >>> x[:, 0] += attribute
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> with Forgetting(find_sites(model, "1"), num_classes=2, every=1) as forgetting:
    ...     for _ in range(3):
    ...         forgetting.observe(y, attribute)
    ...         nn.functional.cross_entropy(model(x), y).backward()
    ...         optimizer.step()
    ...         forgetting.step()
    >>> forgetting.record().units[0].steps  # the first step chose it
    2
    """

    def __init__(
        self,
        sites: Sequence[Site],
        num_classes: int,
        num_attributes: int | None = None,
        *,
        strength: float = 3.0,
        choose: Choose | None = None,
        every: int = 5,
        choices: int | None = None,
        decay: float = 0.95,
        floor: float = FLOOR,
        probe: Probe | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        names = [site.name for site in sites]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Forgetting needs at least one site, each once; got {names}.")
        attributes = num_classes if num_attributes is None else num_attributes
        if num_classes < 1 or attributes < 2:
            raise ValueError(f"There must be a class and two attributes; got {num_classes} and {attributes}.")
        if not (strength >= 0 and every >= 1 and 0 <= decay < 1 and floor > 0):
            raise ValueError(
                "strength must be at least 0, every at least 1, decay in [0, 1) and floor above 0; "
                f"got {strength}, {every}, {decay} and {floor}."
            )
        self.sites = list(sites)
        self.num_classes, self.num_attributes = num_classes, attributes
        self.strength, self.every, self.decay, self.floor = strength, every, decay, floor
        self.choose, self.choices = choose or most_informed(), choices
        self.probe = probe
        self.ranks = ranks
        self._stack = ExitStack()
        self._mark = object()
        self._batch: _Batch | None = None
        self._probed: Tensor | None = None
        self._steps = 0
        self._running: dict[str, Moments] = {}
        self._units: dict[str, Tensor] = {}  # (N,) bool: penalised now
        self._deviation: dict[str, Tensor] = {}  # (channels,) s
        self._scores: dict[str, Tensor] = {}  # (N,) nats, when units were last chosen
        self._information = torch.zeros(2)  # how often the penalty was added, and the sum of its nats
        self._clear_record()

    def __enter__(self) -> Forgetting:
        self._stack.enter_context(eager())
        for site in self.sites:
            self._stack.callback(site.hook(partial(self._attach, site)).remove)
        if self.probe is not None:
            self._stack.callback(self.probe.site.hook(self._read_probe).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._batch = self._probed = None

    def observe(self, y: Tensor, attribute: Tensor | None = None, scale: float | Tensor = 1.0) -> None:
        """Announce the batch whose backward pass comes next.

        Args:
            y: ``(B,)`` classes.
            attribute: ``(B,)`` attributes; ``None`` lets the probe read them.
            scale: what the training step multiplies its mean loss by: the loss scaler's factor (``get_scale()``) over
                the number of batches whose gradients are accumulated.

        Raises:
            ValueError: shapes differ, or there is neither attribute nor probe.
        """
        if attribute is None and self.probe is None:
            raise ValueError("Pass the attribute of each example, or give Forgetting a probe that reads it.")
        if y.ndim != 1 or (attribute is not None and attribute.shape != y.shape):
            shapes = tuple(y.shape), None if attribute is None else tuple(attribute.shape)
            raise ValueError(f"Classes and attributes must be indices of the same shape (B,), got {shapes}.")
        self._batch = _Batch(y.detach(), None if attribute is None else attribute.detach(), scale)

    def step(self) -> None:
        """End the batch, after its backward pass; every few steps units are chosen anew, which is the only moment at
        which processes meet."""
        self._batch = None
        self._steps += 1
        self._record_steps += 1
        for name, units in self._units.items():
            self._touched[name] = self._touched.get(name, 0) + units.long()
        if self._steps == self.every:
            self._warn_of_idle_sites()
        if self._steps % self.every == 0 and self._running:
            self._refresh()
            if self.choices is None or self._steps // self.every <= self.choices:
                self._choose_units()

    @property
    def units(self) -> dict[str, Tensor]:
        """Indices of the units that are penalised now, by site."""
        return {name: units.nonzero()[:, 0] for name, units in self._units.items()}

    @property
    def scores(self) -> dict[str, Tensor]:
        """``{site: (N,)}`` running mutual information of all units in nats, when units were last chosen."""
        return dict(self._scores)

    def record(self) -> Forgotten:
        """What was done since the last call (or the beginning)."""
        units = []
        for name, touched in self._touched.items():
            scores = self._chosen_scores[name].tolist()
            units += [ForgottenUnit(name, i, scores[i], n) for i, n in enumerate(touched.tolist()) if n]
        seen, total = self._information.tolist()
        sizes = {name: len(scores) for name, scores in self._scores.items()}
        done = Forgotten(self._record_steps, total / seen if seen else float("nan"), tuple(units), sizes)
        self._clear_record()
        return done

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: tensors on the CPU and numbers; the record is not part of it."""
        return {
            "steps": self._steps,
            "running": {name: [part.cpu() for part in moments] for name, moments in self._running.items()},
            **{
                key: {name: value.cpu() for name, value in values.items()}
                for key, values in (("units", self._units), ("deviation", self._deviation), ("scores", self._scores))
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: it belongs to other sites.
        """
        unknown = set(state["running"]) - {site.name for site in self.sites}
        if unknown:
            raise ValueError(f"The saved state has the sites {sorted(unknown)}, which this Forgetting does not watch.")
        self._steps = int(state["steps"])
        self._running = {name: Moments(*parts) for name, parts in state["running"].items()}
        self._units, self._deviation = dict(state["units"]), dict(state["deviation"])
        self._scores = dict(state["scores"])
        self._chosen_scores = {name: scores.clone() for name, scores in self._scores.items()}

    # In the forward pass

    def _read_probe(self, activation: Tensor) -> None:
        assert self.probe is not None  # registered for it
        self._probed = reduce_activation(self.probe.site, activation.detach(), "mean").float()

    def _attach(self, site: Site, activation: Tensor) -> None:
        if not (activation.requires_grad and torch.is_grad_enabled()):
            return
        # A checkpointed part runs twice, and what it is given, or gives back as it is, is then the same tensor again.
        node = activation.grad_fn
        if node is not None:
            key = (self._mark, site.name, activation.output_nr)
            metadata: dict[Any, Any] = node.metadata  # type: ignore[assignment]  # a property, typed as a method
            if key in metadata:
                return
            metadata[key] = True
        rows, added = _pool(site, activation.detach()), False

        def add(gradient: Tensor) -> Tensor | None:
            nonlocal added
            if added or self._batch is None or len(rows) != len(self._batch.y):
                return None
            added = True
            extra = self._penalise(site, rows, self._batch)
            return None if extra is None else gradient + _spread(site, extra, gradient)

        activation.register_hook(add)  # type: ignore[no-untyped-call]

    # In the backward pass

    def _penalise(self, site: Site, rows: Tensor, batch: _Batch) -> Tensor | None:
        """The scaled penalty's gradient ``(B, channels)``, if units of this site are penalised."""
        y, attribute = batch.y.to(rows.device).long(), self._attribute(batch).to(rows.device).long()
        self._count(site, rows, y, attribute)
        units = self._units.get(site.name)
        if units is None or self.strength == 0:
            return None
        channels = units.to(rows.device).repeat_interleave(site.channels_per_unit)
        information, gradient = information_gradient(
            rows,
            y,
            attribute,
            self.num_classes,
            self.num_attributes,
            self._deviation[site.name].to(rows),
            self.floor,
        )
        share = channels.to(rows) / channels.sum().clamp_min(1)  # of each channel in the site's mean
        seen = torch.stack([torch.ones_like(information[0]), share @ information])
        self._information = self._information.to(seen.device) + seen.detach()
        return gradient * (share * (self.strength / len(self.sites) * batch.scale))

    def _attribute(self, batch: _Batch) -> Tensor:
        if batch.attribute is not None:
            return batch.attribute
        assert self.probe is not None  # else observe() refused
        if self._probed is None or len(self._probed) != len(batch.y):
            raise RuntimeError(
                f"The probe's site {self.probe.site.name!r} gave no row per label in this forward pass, so the "
                "attribute is unknown. Name a layer that runs once on every batch, or pass `attribute` to observe()."
            )
        with torch.no_grad():
            return self.probe.attribute(self._probed)

    def _count(self, site: Site, rows: Tensor, y: Tensor, attribute: Tensor) -> None:
        """Take a batch into the moving average: sums decay, so that means are weighted by how recent they are."""
        dtype = torch.float32 if rows.device.type == "mps" else torch.float64
        new = group_moments(rows.to(dtype), y, attribute, self.num_classes, self.num_attributes)
        old = self._running.get(site.name)
        if old is not None and old.totals.shape != new.totals.shape:
            raise ValueError(
                f"Site {site.name!r} gave {rows.shape[1]} channels after {old.totals.shape[-1]}: its layer runs "
                "several times, as activations that blocks share do. Name the layers before it, or whole blocks."
            )
        if old is not None:
            new = Moments(*(self.decay * a.to(b) + b for a, b in zip(old, new, strict=True)))
        self._running[site.name] = new

    def _warn_of_idle_sites(self) -> None:
        idle = [site.name for site in self.sites if site.name not in self._running]
        if idle:
            warnings.warn(
                f"Forgetting has no effect at {', '.join(idle)}: no gradient came back with a row per label. The "
                "layers do not run in the training step, nothing below them is trained, or an in-place operation "
                "overwrites a view that they return. Name other layers.",
                stacklevel=3,
            )

    def _refresh(self) -> None:
        """Put the running sums of all processes together: scores and deviations."""
        for site in self.sites:
            if site.name not in self._running:
                continue
            moments = Moments(*map(self.ranks.total, self._running[site.name]))
            counted = ((moments.counts > 0).sum(1) >= 2).to(moments.totals)  # (C,)
            effect = counted @ attribute_information(moments, floor=self.floor) / counted.sum().clamp_min(1)
            self._scores[site.name] = effect.view(-1, site.channels_per_unit).mean(1).float()
            self._deviation[site.name] = moments.deviation().float()

    def _choose_units(self) -> None:
        chosen = self.choose(self._scores)
        self._units = {name: torch.zeros_like(self._scores[name], dtype=torch.bool) for name in chosen}
        for name, indices in chosen.items():
            mask = self._units[name]
            mask[indices.to(mask.device)] = True
            last = self._chosen_scores.get(name, torch.zeros_like(self._scores[name])).to(mask.device)
            self._chosen_scores[name] = torch.where(mask, self._scores[name], last)

    def _clear_record(self) -> None:
        self._record_steps = 0
        self._touched: dict[str, Tensor] = {}  # (N,) steps
        self._chosen_scores = {name: scores.clone() for name, scores in self._scores.items()}
        self._information = torch.zeros(2)


class _Batch(NamedTuple):
    y: Tensor
    attribute: Tensor | None
    scale: float | Tensor


def _pool(site: Site, activation: Tensor) -> Tensor:
    """``(B, channels)`` float32 (float64 stays): the mean over space or tokens."""
    x = site.examples_first(activation).movedim(site.unit_axis(activation), -1)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(dtype) if x.ndim == 2 else x.flatten(1, -2).mean(1, dtype=dtype)


def _spread(site: Site, rows: Tensor, activation: Tensor) -> Tensor:
    """The gradient of a function of :func:`_pool`'s rows with respect to the activation; the opposite of pooling."""
    shape = [1] * activation.ndim
    shape[0 if activation.ndim != 3 or site.batch_first else 1] = rows.shape[0]
    shape[site.unit_axis(activation)] = rows.shape[1]
    return (rows / (activation.numel() // rows.numel())).view(shape).to(activation.dtype)
