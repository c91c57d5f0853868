"""What every score needs: a quiet evaluation of the model, and sums over the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from demem.batch import Batch, apply_model, batch_size
from demem.sites import ActivationReader, Site, eager


class Ranks(NamedTuple):
    """How the processes of a distributed run are put together; the default is a single process.

    Attributes:
        gather: rows ``(n, ...)`` of this process → rows of all processes, the same on each.
        total: a tensor → its sum over all processes.
        rank: number of this process.
    """

    gather: Callable[[Tensor], Tensor] = lambda rows: rows
    total: Callable[[Tensor], Tensor] = lambda value: value
    rank: int = 0


ALONE = Ranks()


@contextmanager
def evaluating(model: nn.Module, freeze: bool = True) -> Iterator[None]:
    """Evaluation mode, compiled parts run eagerly, parameters (if ``freeze``) ask for no gradient; restored after."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        for p, _ in wanted:
            p.requires_grad_(False if freeze else p.is_floating_point())
        with eager(), torch.inference_mode(False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in wanted:
            p.requires_grad_(flag)


def predict(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits ``(S, C)`` float32, labels ``(S,)`` and groups ``(S,)`` or ``None`` of all batches, in evaluation mode.

    Raises:
        ValueError: there is no example.
    """
    logits, labels, groups = [], [], []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            logits.append(apply_model(model, batch.x).float())
            labels.append(batch.y)
            groups.append(batch.group)
    if not logits:
        raise ValueError("There are no examples to trace.")
    known = [g for g in groups if g is not None]
    return torch.cat(logits), torch.cat(labels), torch.cat(known) if len(known) == len(groups) else None


def read_features(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Reduced activations ``{site: (S, N)}``, logits ``(S, C)`` and labels ``(S,)``, in one pass without gradients."""
    rows: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    logits, labels = [], []
    with evaluating(model), torch.no_grad(), ActivationReader(sites) as reader:
        for batch in batches:
            logits.append(apply_model(model, batch.x).float())
            labels.append(batch.y)
            for name, value in reader.pop().items():
                rows[name].append(value.float())
    if not logits:
        raise ValueError("There are no examples to trace.")
    return {name: torch.cat(parts) for name, parts in rows.items()}, torch.cat(logits), torch.cat(labels)


def select_rows(batch: Batch, chosen: Tensor) -> Batch:
    """The examples of a batch that ``chosen`` (bool or indices, on the CPU or the batch's device) picks."""
    index = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
    return Batch(
        _rows(batch.x, index, batch_size(batch)),
        batch.y[index.to(batch.y.device)],
        None if batch.group is None else batch.group[index.to(batch.group.device)],
    )


def _rows(x: Any, index: Tensor, size: int) -> Any:
    if isinstance(x, Tensor):
        return x[index.to(x.device)] if x.ndim and len(x) == size else x
    if isinstance(x, Mapping):
        return {key: _rows(value, index, size) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_rows(value, index, size) for value in x)
    return x


def per_unit(site: Site, channels: Tensor) -> Tensor:
    """Add up the channels of each unit: ``(..., C)`` → ``(..., N)``."""
    if site.channels_per_unit == 1:
        return channels
    return channels.reshape(*channels.shape[:-1], -1, site.channels_per_unit).sum(-1)
