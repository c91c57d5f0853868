"""Read the activations of sites during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from demem.batch import apply_model, as_logits
from demem.sites.find import Site, check_finite, named_layers

Reduce = Literal["auto", "mean", "max", "first_token", "positions"]


def reduce_activation(site: Site, activation: Tensor, reduce: Reduce = "auto") -> Tensor:
    """Turn one layer's activation into a matrix with a row per sample and a column per unit.

    Args:
        site: tells which axis counts units.
        activation: ``(B, C)``, ``(B, C, *spatial)`` or ``(B, T, C)``; ``(T, B, C)`` where the site is not batch first.
        reduce: over space or tokens: ``"mean"``, ``"max"``, ``"first_token"`` (token axis only), ``"positions"``
            (every position becomes a row of its own), or ``"auto"``: mean over space, first token of a sequence
            (the choices of Bansal et al. 2022).

    Returns:
        ``(B, N)``, or ``(B·positions, N)`` for ``"positions"``.  For attention heads a unit's value is the root mean
        square over its channels.
    """
    activation = site.examples_first(activation)
    axis = site.unit_axis(activation)
    x = activation.movedim(axis, -1)
    if site.channels_per_unit > 1:
        x = x.reshape(*x.shape[:-1], -1, site.channels_per_unit).square().mean(-1).sqrt()
    if x.ndim == 2:
        return x
    tokens = axis == -1 and activation.ndim == 3
    x = x.flatten(1, -2)
    if reduce == "auto":
        reduce = "first_token" if tokens else "mean"
    if reduce == "mean":
        return x.mean(1)
    if reduce == "max":
        return x.amax(1)
    if reduce == "positions":
        return x.flatten(0, 1)
    if reduce == "first_token":
        if not tokens:
            raise ValueError(f"Site {site.name!r} has no token axis (shape {tuple(activation.shape)}); use 'mean'.")
        return x[:, 0]
    raise ValueError(f"Unknown reduction {reduce!r}; use auto, mean, max, first_token or positions.")


_eager: list[ExitStack] = []  # empty outside, one entry inside; two monitors may leave in the order they came
_eager_users = 0


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules as plain ones, and attention without its fused fast path, so that hooks inside them run.

    Uses may overlap in any order; the last one to leave restores what the first one found.
    """
    global _eager_users
    if _eager_users == 0:
        stack = ExitStack()
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        set_stance = getattr(torch.compiler, "set_stance", None)  # torch ≥ 2.6
        if set_stance is not None:
            stack.enter_context(set_stance("force_eager"))
        _eager.append(stack)
    _eager_users += 1
    try:
        yield
    finally:
        _eager_users -= 1
        if _eager_users == 0:
            _eager.pop().close()


class ActivationReader:
    """Context manager that collects the activations of several sites in one forward pass.

    ::

        with ActivationReader(sites) as reader:
            model(x)
            activations = reader.pop()      # {site name: (B, N)}

    A model compiled with ``torch.compile`` runs eagerly meanwhile, since hooks added later have no effect on it.
    Reduction happens inside the hook, so an in-place ReLU that follows cannot rewrite what was read.

    Args:
        sites: from :func:`demem.sites.find_sites`.
        reduce: see :func:`reduce_activation`; ``None`` keeps whole activations (cloned).
        ungated: read before the gates of :class:`demem.sites.Gates` are applied.
        optional: leave out layers that do not run, unless none does.
    """

    def __init__(
        self, sites: Sequence[Site], reduce: Reduce | None = "auto", ungated: bool = False, optional: bool = False
    ) -> None:
        self.sites = list(sites)
        self.reduce = reduce
        self.ungated = ungated
        self.optional = optional
        self._handles: list[RemovableHandle] = []
        self._rows: dict[str, list[Tensor]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ActivationReader:
        self._stack.enter_context(eager())
        for site in self.sites:
            self._handles.append(site.hook(partial(self._store, site), prepend=self.ungated))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._rows.clear()
        self._stack.close()

    def pop(self) -> dict[str, Tensor]:
        """What was read since the last call; a layer that ran twice (shared module) gives its rows one after the other.

        Raises:
            RuntimeError: a site's layer did not run.
        """
        missing = [site.name for site in self.sites if site.name not in self._rows]
        if missing and not (self.optional and self._rows):
            raise RuntimeError(
                f"These layers did not run in the forward pass, so nothing could be read: {', '.join(missing)}."
            )
        rows = {site.name: torch.cat(self._rows[site.name]) for site in self.sites if site.name in self._rows}
        self._rows.clear()
        return rows

    def _store(self, site: Site, activation: Tensor) -> None:
        x = activation.detach()
        x = site.examples_first(x).clone() if self.reduce is None else reduce_activation(site, x, self.reduce)
        # A view (2-D input, first token) would change under a later in-place operation.
        if x.untyped_storage().data_ptr() == activation.untyped_storage().data_ptr():
            x = x.clone()
        self._rows.setdefault(site.name, []).append(x)


def deciding_heads(model: nn.Module, x: Any) -> list[str]:
    """Linear layers that give the model's logits alone, up to a positive scale and what all classes share.

    Two heads whose logits are averaged, or an auxiliary one, do not count; nor does one whose output is squashed.

    Args:
        model: maps ``x`` to logits.
        x: one batch.

    Returns:
        Qualified names, in the order of definition.

    Raises:
        ValueError: logits are not finite.
    """
    layers = {name: module for name, module in named_layers(model).items() if isinstance(module, nn.Linear)}
    sites = {name: Site(name, layer) for name, layer in layers.items()}
    with torch.no_grad(), ActivationReader(list(sites.values()), "mean", optional=True) as reader:
        logits = _centred(check_finite(apply_model(model, x).float(), "the logits"))
        outputs = {name: _centred(as_logits(rows.float())) for name, rows in reader.pop().items()}

    def with_output(name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        hook = sites[name].hook(change)
        try:
            return _centred(apply_model(model, x).float())
        finally:
            hook.remove()

    def decides(name: str, output: Tensor) -> bool:
        if output.shape != logits.shape or (output * logits).sum() < 0.999 * output.norm() * logits.norm():
            return False
        # Logits that hardly differ between examples resemble any head's; another head's would not change with it.
        if bool(logits.any()):
            change, expected = with_output(name, torch.neg), -logits
        else:  # a new head of zeros
            shift = torch.arange(layers[name].out_features, device=logits.device) + 1.0
            change = with_output(name, lambda out: out + shift.to(out))
            expected = _centred(as_logits(shift.expand(len(logits), -1)))
        return bool((change - expected).norm() <= 0.01 * expected.norm())

    with torch.no_grad(), eager():
        return [name for name, output in outputs.items() if decides(name, output)]


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)
