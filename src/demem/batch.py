"""Read ``(inputs, labels, groups)`` from the batches of a data loader, and logits from the output of a model.

These forms are read without further help: ``(x, y)``; ``(x, y, group)``; ``(x, y, metadata)`` as wilds yields it, given
the dataset's grouper; a mapping with inputs (``x``, ``image``, ``pixel_values``, ``input_ids`` …), labels (``y``,
``label``, ``labels``, ``target``) and groups (``group``, ``groups``, ``g``, ``metadata``).  Other keys of a mapping are
passed on with the inputs if the module's ``forward`` has parameters of these names (``mask``), and all of them if it
is ``forward(self, **inputs)``.  One-hot labels ``(B, C)`` are class indices, too.

**Any other batch:** define one method on your LightningModule::

    def unpack_batch(self, batch):
        return x, y, group        # group may be None
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_INPUT_KEYS = ("x", "image", "images", "img", "input", "inputs", "pixel_values", "data")
_LABEL_KEYS = ("y", "label", "labels", "target", "targets", "class")
_GROUP_KEYS = ("group", "groups", "g", "group_id")
_METADATA_KEYS = ("metadata", "meta")
_CONTRACT = (
    "forward(x) must take the inputs of a batch and return logits (B, C). If it takes the whole batch or several "
    "inputs, define `unpack_batch(self, batch)` on your LightningModule; a mapping x goes in as forward(**x)."
)
_SINGLE_LABEL = "demem's callbacks are for single-label classification."
_OWN = (
    "demem reads batches by a method of this name: let it take a batch and return (x, y), (x, y, group or None) or a "
    "dict with these keys. If yours serves another purpose, give it another name."
)


class Batch(NamedTuple):
    """Inputs of any form that the model takes, labels ``(B,)`` int64, groups ``(B,)`` int64 or ``None``."""

    x: Any
    y: Tensor
    group: Tensor | None = None


def unpack_batch(
    batch: Any, module: nn.Module | None = None, grouper: Callable[[Tensor], Tensor] | None = None
) -> Batch:
    """Read inputs, labels and groups from a batch.

    Args:
        batch: a tuple ``(x, y)``, ``(x, y, group)`` or ``(x, y, metadata)``, or a mapping (keys: see the module).
        module: its ``unpack_batch`` method, if it has one, reads the batch; the parameters of its ``forward`` decide
            which keys of a mapping are inputs.
        grouper: maps a metadata matrix ``(B, M)`` to groups ``(B,)``, e.g. ``metadata_to_group`` of a wilds
            ``CombinatorialGrouper``.  Without it a single integer column is the groups, and with several columns the
            groups are ``None``.

    Raises:
        TypeError: the batch has a form that cannot be read; the message says how to adapt it.
        ValueError: labels are not integers of shape ``(B,)`` or are negative, or groups have another length.

    Example:
        >>> batch = {"image": torch.zeros(2, 3), "label": torch.tensor([[1], [0]])}
        >>> unpack_batch(batch)
        Batch(x=tensor([[0., 0., 0.],
                        [0., 0., 0.]]), y=tensor([1, 0]), group=None)
    """
    own = getattr(module, "unpack_batch", None)
    if callable(own):
        batch = _call_own(own, batch)
    parts = _from_mapping(batch, module) if isinstance(batch, Mapping) else batch
    if not isinstance(parts, list | tuple) or len(parts) not in (2, 3) or not isinstance(parts[1], Tensor):
        raise TypeError(_own_is_no_batch(own, batch) if callable(own) else _unreadable(batch))
    x, y, extra = (*parts, None)[:3]
    return Batch(x, _class_indices(y), _to_group(extra, len(y), grouper))


def batch_size(batch: Batch) -> int:
    """Return the number of examples.

    Example:
        >>> batch_size(Batch("any input", torch.tensor([1, 0, 1])))
        3
    """
    return int(batch.y.shape[0])


def call_model(model: nn.Module, x: Any) -> Any:
    """Call the model; a mapping is passed as keyword arguments (``input_ids``, ``attention_mask`` …).

    Example:
        >>> call_model(nn.Identity(), {"input": torch.tensor([1.0])})
        tensor([1.])
    """
    return model(**x) if isinstance(x, Mapping) else model(x)


def apply_model(model: nn.Module, x: Any) -> Tensor:
    """Compute the logits ``(B, C)`` of a model.

    A single logit z per example becomes two, ``(0, z)``, so that binary heads with one output need no special case.

    Args:
        model: takes ``x``, or its items as keyword arguments where ``x`` is a mapping.
        x: inputs of a :class:`Batch`.

    Raises:
        TypeError: the model does not take ``x``, or its output contains no logits.
        ValueError: the logits are not of shape ``(B, C)``.

    Example:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> apply_model(model, torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """
    try:
        output = call_model(model, x)
    except (TypeError, IndexError) as error:
        raise TypeError(f"{error}. {_CONTRACT}") from error
    logits = as_logits(output)
    if isinstance(x, Tensor) and len(logits) not in x.shape[:2]:  # inputs may be (T, B)
        raise ValueError(f"Inputs {tuple(x.shape)} gave logits {tuple(logits.shape)}. {_CONTRACT}")
    return logits


def as_logits(output: Any) -> Tensor:
    """Extract the logits ``(B, C)`` from a model's output.

    Args:
        output: a tensor, an object with ``.logits``, a mapping with the key ``"logits"``, or a tuple or list that
            starts with the logits.  One logit z per example becomes ``(0, z)``.

    Raises:
        TypeError: the output contains no logits.
        ValueError: the logits are not of shape ``(B, C)``.

    Example:
        >>> as_logits({"logits": torch.tensor([2.0, -1.0]), "loss": None})
        tensor([[ 0.,  2.],
                [ 0., -1.]])
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output[0] if isinstance(output, tuple | list) and output else None)
    if not isinstance(output, Tensor):
        raise TypeError(
            "The model's output holds no logits. Return a tensor (B, C), an object with '.logits', a mapping with the "
            "key 'logits', or a tuple that starts with the logits."
        )
    if output.ndim == 1:
        output = output[:, None]
    if output.ndim != 2:
        raise ValueError(f"Logits must have the shape (B, C), got {tuple(output.shape)}.")
    return torch.cat([torch.zeros_like(output), output], 1) if output.shape[1] == 1 else output


def _call_own(own: Callable[..., Any], batch: Any) -> Any:
    try:
        inspect.signature(own).bind(batch)
    except ValueError:  # the signature of a compiled function is unknown
        pass
    except TypeError as error:
        raise TypeError(f"unpack_batch(batch) cannot be called: {error}. {_OWN}") from error
    return own(batch)


def _own_is_no_batch(own: Callable[..., Any], batch: Any) -> str:
    owner = type(getattr(own, "__self__", None)).__name__
    return f"unpack_batch of {owner} returned {form_of(batch)}. {_OWN}"


def _from_mapping(batch: Mapping[str, Any], module: nn.Module | None) -> tuple[Any, Any, Any] | None:
    def pick(keys: tuple[str, ...]) -> Any:
        return next((batch[k] for k in keys if k in batch), None)

    y, group, x = pick(_LABEL_KEYS), pick(_GROUP_KEYS), pick(_INPUT_KEYS)
    if group is None:
        group = pick(_METADATA_KEYS)
    if x is None:  # a tokenizer's output: every other key is an input of the model
        known = {*_LABEL_KEYS, *_GROUP_KEYS, *_METADATA_KEYS}
        x = {k: v for k, v in batch.items() if k not in known} if "input_ids" in batch else None
    elif module is not None and (len(batch) > 2 or _takes_keywords_only(module)):
        key = next(k for k in _INPUT_KEYS if k in batch)
        names = _parameters(module)
        if _takes_keywords_only(module):  # forward(self, **inputs)
            known = {*_LABEL_KEYS, *_GROUP_KEYS, *_METADATA_KEYS}
            return {k: v for k, v in batch.items() if k not in known}, y, group
        first = key if key in names else next(iter(names), key)
        others = {k: batch[k] for k in names if k in batch and k not in (first, *_LABEL_KEYS, *_GROUP_KEYS)}
        x = {first: x, **others} if others else x
    return None if x is None or y is None else (x, y, group)


def _takes_keywords_only(module: nn.Module) -> bool:
    try:
        kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    except ValueError:
        return False
    return kinds == [inspect.Parameter.VAR_KEYWORD]


def _parameters(module: nn.Module) -> list[str]:
    """Return the parameters of ``forward``; of the first child with weights where it takes anything (a wrapper)."""
    try:
        taken = inspect.signature(module.forward).parameters.values()
    except ValueError:  # the signature of a traced module is unknown
        return []
    named = [p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if named:
        return named
    return next((_parameters(child) for child in module.children() if any(True for _ in child.parameters())), [])


def _class_indices(y: Tensor) -> Tensor:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    elif y.ndim == 2 and y.numel() and bool(((y == 0) | (y == 1)).all() & (y.sum(1) == 1).all()):
        y = y.argmax(1)  # one-hot
    if y.ndim != 1:
        raise ValueError(
            f"Labels must be class indices of shape (B,), got {tuple(y.shape)}. {_SINGLE_LABEL} Soft labels, as MixUp "
            "and CutMix give in a collate function, are not: mix batches in training_step instead, or define "
            "`unpack_batch(self, batch)` on your LightningModule and return unmixed inputs and class indices."
        )
    if y.is_floating_point():
        if not bool((y == y.round()).all()):
            raise ValueError(f"Labels must be class indices, got fractional numbers or NaN. {_SINGLE_LABEL}")
    elif y.dtype == torch.bool:
        y = y.int()
    y = y.long()
    if y.numel() and int(y.min()) < 0:
        raise ValueError(f"Labels must be class indices from 0 up, got {int(y.min())}.")
    return y


def _to_group(extra: Any, size: int, grouper: Callable[[Tensor], Tensor] | None) -> Tensor | None:
    if not isinstance(extra, Tensor):
        return None
    if extra.ndim == 2:
        if grouper is not None:
            extra = grouper(extra)
        elif extra.shape[1] == 1 and not extra.is_floating_point():
            extra = extra[:, 0]
        else:
            return None
    if extra.shape != (size,) or extra.is_floating_point():
        raise ValueError(
            f"Groups must be integers of shape ({size},), got {extra.dtype} {tuple(extra.shape)}. If the third part of "
            "(x, y, …) is no group, define `unpack_batch(self, batch)` on your LightningModule and return (x, y, None)."
        )
    if extra.numel() and int(extra.min()) < 0:
        raise ValueError(f"Groups must be indices from 0 up, got {int(extra.min())}.")
    group: Tensor = extra.long()
    return group


def has_group_part(batch: Any, module: nn.Module | None = None) -> bool:
    """Whether a batch has something in the place of groups, be it readable or not.

    Args:
        batch: what a data loader yields, of a form that :func:`unpack_batch` reads.
        module: if it has an ``unpack_batch`` method, that alone decides what a group is.

    Example:
        >>> has_group_part((torch.zeros(2, 3), torch.zeros(2), ["land", "water"]))
        True
        >>> has_group_part({"x": torch.zeros(2, 3), "y": torch.zeros(2)})
        False
    """
    if callable(getattr(module, "unpack_batch", None)):
        return False
    if isinstance(batch, Mapping):
        metadata = any(isinstance(batch.get(key), Tensor) for key in _METADATA_KEYS)
        return metadata or any(key in batch for key in _GROUP_KEYS)
    return len(batch) > 2 and isinstance(batch[2], Tensor | list | tuple)


def form_of(batch: Any) -> str:
    """Describe the form of a batch, for messages.

    Example:
        >>> form_of((torch.zeros(2, 3), [1, 0]))
        'a tuple of (Tensor, list of int)'
    """

    def kind(value: Any) -> str:
        name = type(value).__name__
        return f"{name} of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else name

    if isinstance(batch, Mapping):
        return f"a mapping of {', '.join(sorted(f'{key!r}: {kind(value)}' for key, value in batch.items()))}"
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of ({', '.join(map(kind, batch))})"
    return type(batch).__name__


def _unreadable(batch: Any) -> str:
    return (
        f"Cannot read a batch that is {form_of(batch)}. Yield (x, y), (x, y, group), or a dict with 'x', 'y' and "
        "'group'; or define `unpack_batch(self, batch)` on your LightningModule and return (x, y, group or None)."
    )
