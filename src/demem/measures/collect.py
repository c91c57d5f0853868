"""Collect the activations of several sites in one pass, in bounded memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from demem.batch import Batch, call_model, unpack_batch
from demem.measures.reservoir import reservoir_compact, reservoir_keys
from demem.sites import ActivationReader, Reduce, default_sites, find_sites, restore_modes


def collect_activations(
    model: nn.Module,
    batches: Iterable[Any],
    layers: str | Sequence[str] | None = None,
    reduce: Reduce = "auto",
    max_samples: int | None = 10_000,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Run the model in evaluation mode and keep a random sample of the rows of every site.

    Args:
        model: any module; its modes are restored afterwards.
        batches: inputs alone (labels are not needed), or anything that :func:`demem.batch.unpack_batch` reads.
        layers: site patterns, see :func:`demem.sites.find_sites`; :func:`demem.sites.default_sites` if ``None``.  The
            name of a linear layer reads before the nonlinearity, the name of the activation module after it.
        reduce: over space or tokens, see :func:`demem.sites.reduce_activation`.
        max_samples: keep at most this many rows of a site (the paper's 10,000); ``None`` keeps all.
        seed: seed of the sample; the same positions are kept for the same order of the data.

    Returns:
        ``{site: (S, N)}`` on the CPU.

    Raises:
        ValueError: a pattern matches nothing, or there are no batches.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x = collect_activations(model, torch.randn(500, 4).split(100), ["0", "2:input"], max_samples=200)
        >>> {site: tuple(rows.shape) for site, rows in x.items()}
        {'0': (200, 3), '2:input': (200, 3)}
    """
    sites = default_sites(model) if layers is None else find_sites(model, layers)
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kept: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    model.eval()
    try:
        with torch.no_grad(), ActivationReader(sites, reduce, optional=layers is None) as reader:
            for raw in batches:
                call_model(model, _inputs(raw, model, device))
                for name, rows in reader.pop().items():
                    first, seen[name] = seen[name], seen[name] + len(rows)
                    kept[name].append((reservoir_keys(torch.arange(first, seen[name]), seed), rows.cpu()))
                    if max_samples and first // max_samples < seen[name] // max_samples:  # seldom: copies all rows
                        kept[name] = [_sample(kept[name], max_samples)]
    finally:
        restore_modes(modes)
    if not kept:
        raise ValueError("There were no batches to read activations from.")
    return {name: _sample(kept.pop(name), max_samples)[1] for name in list(kept)}


def _sample(parts: list[tuple[Tensor, Tensor]], most: int | None) -> tuple[Tensor, Tensor]:
    keys, rows = (torch.cat(part) for part in zip(*parts, strict=True))
    return (keys, rows) if most is None else reservoir_compact(keys, rows, most)


def _inputs(raw: Any, model: nn.Module, device: torch.device) -> Any:
    x = raw if isinstance(raw, Tensor) else raw[0] if isinstance(raw, list | tuple) and len(raw) == 1 else None
    if x is None:
        x = raw.x if isinstance(raw, Batch) else unpack_batch(raw, model).x
    if isinstance(x, Mapping):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in x.items()}
    return x.to(device) if isinstance(x, Tensor) else x
