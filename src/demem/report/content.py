"""Turn the input of one example into what a person can look at: a picture, text or the values of a row."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from demem.report.facts import Content

LARGEST = 128  # pixels of a picture's longer side
COLUMNS = 12  # values of a row


def look_at(
    x: Any, decode: Callable[[Any], Content] | None = None, feature_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Content of one example: ``text``, ``picture`` (a PNG as ``data:`` address, with ``pixels``) or ``row``.

    ============================================  ==================================================
    input                                         content
    ============================================  ==================================================
    what ``decode`` makes of it                   text, a picture or a row, by its type
    float ``(C, H, W)`` of at most 4 channels     picture, scaled from its smallest to its largest value
    integers ``(T,)``, or a mapping with          the numbers
    ``input_ids``
    float ``(N,)``                                row: the first 12 values
    anything else                                 its shape
    ============================================  ==================================================

    Args:
        x: the input of one example, without a batch axis.
        decode: see :class:`demem.report.ReportOptions`.
        feature_names: names of the values of a row.

    Example:
        >>> look_at(torch.tensor([0.5, 2.0]), feature_names=["age", "income"])
        {'row': {'age': '0.5', 'income': '2'}}
        >>> look_at({"input_ids": torch.tensor([101, 7, 102])}, decode=lambda x: f"{len(x['input_ids'])} tokens")
        {'text': '3 tokens'}
        >>> look_at(torch.rand(3, 8, 8))["pixels"]
        8
    """
    shown = x if decode is None else decode(x)
    if isinstance(shown, str):
        return {"text": shown}
    if isinstance(shown, Mapping) and "input_ids" in shown:
        shown = shown["input_ids"]
    elif isinstance(shown, Mapping):
        inputs = [v for v in shown.values() if isinstance(v, Tensor) and v.ndim]
        if not inputs or decode is not None:
            return {"row": _row({str(name): value for name, value in shown.items()})}
        shown = inputs[0]
    if isinstance(shown, list | tuple) and shown and isinstance(shown[0], Tensor):
        shown = shown[0]
    values = torch.as_tensor(shown).detach().cpu()
    if values.ndim == 2 and values.is_floating_point() and min(values.shape) > 3 and decode is not None:
        values = values[None]
    if values.ndim == 3 and len(values) <= 4:
        return {"picture": picture(values), "pixels": int(values.shape[-1])}
    if values.ndim <= 1 and not values.is_floating_point():
        numbers = [str(v) for v in values.reshape(-1).tolist()]
        return {"text": "token ids " + " ".join(numbers[:60]) + " …" * (len(numbers) > 60)}
    if values.ndim == 1:
        names = feature_names or [f"x{i}" for i in range(len(values))]
        return {"row": _row(dict(zip(names, values.tolist(), strict=False)))}
    return {"text": f"an input of shape {tuple(values.shape)} that cannot be shown; pass decode or show"}


def picture(image: Tensor) -> str:
    """A PNG as ``data:`` address of ``(C, H, W)``, scaled from its smallest to its largest value.

    Two channels are shown as red and green; of four the last is left out.

    Example:
        >>> picture(torch.rand(1, 8, 8))[:22]
        'data:image/png;base64,'
    """
    from matplotlib.image import imsave

    x = image.detach().float().cpu()[:3]
    x = x.expand(3, -1, -1) if len(x) == 1 else torch.cat([x, torch.zeros(3 - len(x), *x.shape[1:])])
    longest = max(x.shape[1:])
    if longest > LARGEST:
        size = [max(1, round(n * LARGEST / longest)) for n in x.shape[1:]]
        x = F.interpolate(x[None], size, mode="area")[0]
    low, high = float(x.min()), float(x.max())
    x = ((x - low) / max(high - low, 1e-12)).clamp(0, 1)
    file = BytesIO()
    imsave(file, x.permute(1, 2, 0).mul(255).round().byte().numpy(), format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _row(values: Mapping[str, Any]) -> dict[str, str]:
    row = {name: _short(value) for name, value in list(values.items())[:COLUMNS]}
    return row | ({"…": f"{len(values) - COLUMNS} more"} if len(values) > COLUMNS else {})


def _short(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
