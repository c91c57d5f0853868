"""Evaluate a model without side effects, select examples, and sum over the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from demem.batch import Batch, apply_model, batch_size
from demem.sites import ActivationReader, Site, eager, restore_modes


class Ranks(NamedTuple):
    """Communication between the processes of a distributed run; the default is a single process.

    Attributes:
        gather: maps rows ``(n, ...)`` of this process to the rows of all processes, in the same order on each.
        total: maps a tensor to its sum over all processes.
        rank: number of this process.
    """

    gather: Callable[[Tensor], Tensor] = lambda rows: rows
    total: Callable[[Tensor], Tensor] = lambda value: value
    rank: int = 0


ALONE = Ranks()


@contextmanager
def evaluating(model: nn.Module, freeze: bool = True) -> Iterator[None]:
    """Switch to evaluation mode with compiled parts run eagerly, and restore everything afterwards.

    Parameters require no gradient if ``freeze``, else all floating-point ones do.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> with evaluating(model):
        ...     model.training, model[0].weight.requires_grad
        (False, False)
        >>> model.training, model[0].weight.requires_grad
        (True, True)
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.eval()
        for p, _ in wanted:
            p.requires_grad_(False if freeze else p.is_floating_point())
        with eager(), torch.inference_mode(False):
            yield
    finally:
        restore_modes(modes)
        for p, flag in wanted:
            p.requires_grad_(flag)


def predict(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the model in evaluation mode over all batches.

    Args:
        model: any module; left as it was.
        batches: examples; read once.

    Returns:
        Logits ``(S, C)`` float32, labels ``(S,)`` and groups ``(S,)`` or ``None``.

    Raises:
        ValueError: there are no examples.

    Example:
        >>> data = [Batch(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(2)]
        >>> logits, y, group = predict(nn.Linear(3, 2), data)
        >>> logits.shape, y.shape, group
        (torch.Size([8, 2]), torch.Size([8]), None)
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
    """Read the activations of sites together with logits and labels, in one pass without gradients.

    Args:
        model: any module; run in evaluation mode and left as it was.
        sites: from :func:`demem.sites.find_sites`.
        batches: examples; read once.

    Returns:
        Activations ``{site: (S, N)}`` (:func:`demem.sites.reduce_activation`), logits ``(S, C)``, both float32, and
        labels ``(S,)``.

    Raises:
        ValueError: there are no examples.
        RuntimeError: a site's layer did not run.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [Batch(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))]
        >>> features, logits, y = read_features(model, find_sites(model, "2:input"), data)
        >>> torch.allclose(model[2](features["2:input"]), logits)
        True
    """
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
    """Select examples of a batch.

    Args:
        batch: tensors in its inputs are indexed along the axis that is as long as the batch, the first or the second
            ``(T, B)``; scalars and tensors of length 1 are left, and packed sequences are packed again.
        chosen: bool mask ``(B,)`` or indices, on the CPU or on the batch's device.

    Raises:
        ValueError: the inputs hold something else (a graph, the concatenated tokens of an ``nn.EmbeddingBag``).

    Example:
        >>> select_rows(Batch({"ids": torch.tensor([[7], [8], [9]])}, torch.tensor([0, 1, 1])), torch.tensor([2, 0]))
        Batch(x={'ids': tensor([[9],
                                [7]])}, y=tensor([1, 0]), group=None)
    """
    index = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
    if torch.equal(index.cpu(), torch.arange(batch_size(batch))):
        return batch
    return Batch(
        _rows(batch.x, index, batch_size(batch)),
        batch.y[index.to(batch.y.device)],
        None if batch.group is None else batch.group[index.to(batch.group.device)],
    )


def _rows(x: Any, index: Tensor, size: int) -> Any:
    if isinstance(x, Tensor):
        if x.ndim == 0 or (len(x) == 1 and size > 1):
            return x
        if size in x.shape[:2]:
            return x.index_select(0 if len(x) == size else 1, index.to(x.device))
    elif isinstance(x, Mapping):
        return {key: _rows(value, index, size) for key, value in x.items()}
    elif isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        return pack_padded_sequence(padded[index.to(padded.device)], lengths[index.cpu()], True, enforce_sorted=False)
    elif isinstance(x, list | tuple):
        parts = [_rows(value, index, size) for value in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    elif x is None or isinstance(x, bool | int | float | str):
        return x
    form = f"tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
    raise ValueError(f"Single examples cannot be taken out of a {form} in a batch of {size}.")


def per_unit(site: Site, channels: Tensor) -> Tensor:
    """Add up the channels of each unit: ``(..., C)`` → ``(..., N)``."""
    if site.channels_per_unit == 1:
        return channels
    return channels.reshape(*channels.shape[:-1], -1, site.channels_per_unit).sum(-1)
