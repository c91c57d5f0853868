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
    """Reduce one layer's activation to a matrix with one row per example and one column per unit.

    Args:
        site: the layer and the axis that counts its units.
        activation: ``(B, C)``, ``(B, C, *spatial)`` or ``(B, T, C)``; ``(T, B, C)`` where the site is not batch first.
        reduce: over space or tokens: ``"mean"``, ``"max"``, ``"first_token"`` (token axis only), ``"positions"``
            (one row per position), or ``"auto"``: mean over space, first token of a sequence.

    Returns:
        ``(B, N)``, or ``(B·positions, N)`` for ``"positions"``, in units of the activation.  The value of an attention
        head is the root mean square over its channels.

    Raises:
        ValueError: unknown reduction, or ``"first_token"`` of a layer without tokens.

    Source: ``"auto"`` makes the choices of Bansal et al. 2022.

    Example:
        >>> site = Site("conv", nn.Conv2d(3, 8, 3))
        >>> maps = torch.randn(5, 8, 6, 6)
        >>> torch.equal(reduce_activation(site, maps), maps.mean((2, 3)))
        True
        >>> reduce_activation(site, maps, "positions").shape
        torch.Size([180, 8])
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


_eager: list[ExitStack] = []  # one entry while in use: two monitors may leave in the order in which they entered
_eager_users = 0


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules as plain ones, and attention without its fused fast path, so that hooks inside them run.

    Uses may overlap in any order; the last one to leave restores the settings that the first one found.

    Example:
        >>> model = torch.compile(nn.Linear(4, 3))
        >>> handle = model.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        >>> with eager():
        ...     bool(model(torch.randn(5, 4)).any())
        False
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


def restore_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    """Put every module in the mode that it had, by its own ``train`` where it does more than to note the mode (LoRA
    layers that merge their weights for evaluation).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> modes = [(module, module.training) for module in model.modules()]
        >>> _ = model.eval()
        >>> restore_modes(modes)
        >>> model[1].training
        True
    """
    for module, mode in modes:
        if type(module).train is not nn.Module.train:
            module.train(mode)
    for module, mode in modes:  # train() sets the modules within, too
        module.training = mode


class ActivationReader:
    """Context manager that collects the activations of several sites in one forward pass.

    A model compiled with ``torch.compile`` runs eagerly meanwhile, because hooks that are added later have no effect on
    it.  Activations are reduced inside the hook, so that an in-place ReLU that follows cannot rewrite them.

    Args:
        sites: from :func:`demem.sites.find_sites`.
        reduce: see :func:`reduce_activation`; ``None`` keeps whole activations (cloned), and a function of
            the site and the whole activation, examples first, makes rows ``(B, …)`` of it.
        ungated: read before the gates of :class:`demem.sites.Gates` are applied.
        optional: leave out layers that do not run, unless none does.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 2))
        >>> with ActivationReader(find_sites(model, ["0", "3:input"])) as reader:
        ...     logits = model(torch.randn(5, 3, 8, 8))
        ...     activations = reader.pop()
        >>> {name: tuple(rows.shape) for name, rows in activations.items()}
        {'0': (5, 8), '3:input': (5, 288)}
    """

    def __init__(
        self,
        sites: Sequence[Site],
        reduce: Reduce | Callable[[Site, Tensor], Tensor] | None = "auto",
        ungated: bool = False,
        optional: bool = False,
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

    @property
    def ran(self) -> bool:
        """Whether any of the layers ran since the last call of :meth:`pop`."""
        return bool(self._rows)

    def pop(self) -> dict[str, Tensor]:
        """Return ``{site name: (B, N)}`` of all forward passes since the last call, and forget them.

        A layer that runs twice in a pass (a shared module) contributes two rows per example, one pass after the other.

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
        if callable(self.reduce):
            x = self.reduce(site, site.examples_first(x))
        else:
            x = site.examples_first(x).clone() if self.reduce is None else reduce_activation(site, x, self.reduce)
        # A view (2-D input, first token) would be rewritten by a later in-place operation.
        if x.untyped_storage().data_ptr() == activation.untyped_storage().data_ptr():
            x = x.clone()
        self._rows.setdefault(site.name, []).append(x)


def deciding_heads(model: nn.Module, x: Any) -> list[str]:
    """Find linear layers whose output alone determines the model's logits, up to a positive scale and a shift that all
    classes share.

    Two heads whose logits are averaged, an auxiliary head, or one whose output is squashed do not qualify.  A layer
    qualifies if its centred output is proportional to the centred logits, and if negating (or shifting) the output
    negates (or shifts) the logits.

    Args:
        model: maps ``x`` to logits.
        x: inputs of one batch.

    Returns:
        Qualified names, in the order of definition.

    Raises:
        ValueError: logits are not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.LogSoftmax(1))
        >>> deciding_heads(model, torch.randn(5, 4))
        ['2']
    """
    layers = {name: module for name, module in named_layers(model).items() if isinstance(module, nn.Linear)}
    sites = {name: Site(name, layer) for name, layer in layers.items()}
    with torch.no_grad(), ActivationReader(list(sites.values()), "mean", optional=True) as reader:
        logits = _centred(check_finite(apply_model(model, x).float(), "the logits"))
        outputs = {name: as_logits(rows.float()) for name, rows in reader.pop().items()}

    def with_output(name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        hook = sites[name].hook(change)
        try:
            return _centred(apply_model(model, x).float())
        finally:
            hook.remove()

    def decides(name: str, output: Tensor) -> bool:
        if not gives_logits(output, logits):
            return False
        # Logits that hardly differ between examples resemble the output of any head, so intervene on this one.
        if bool(logits.any()):
            change, expected = with_output(name, torch.neg), -logits
        else:  # a new head of zeros
            shift = torch.arange(layers[name].out_features, device=logits.device) + 1.0
            change = with_output(name, lambda out: out + shift.to(out))
            expected = _centred(as_logits(shift.expand(len(logits), -1)))
        return bool((change - expected).norm() <= 0.01 * expected.norm())

    with torch.no_grad(), eager():
        return [name for name, output in outputs.items() if decides(name, output)]


def gives_logits(output: Tensor, logits: Tensor | None) -> bool:
    """Whether logits ``(S, C)`` are the output of a head up to a positive scale and a shift that all classes share.

    >>> gives_logits(torch.eye(2), 3 * torch.eye(2) + 1), gives_logits(torch.eye(2), torch.eye(2)[:1])
    (True, False)
    """
    if logits is None or output.shape != logits.shape:
        return False
    a, b = _centred(output), _centred(logits)
    return bool((a * b).sum() >= 0.999 * a.norm() * b.norm())


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)
