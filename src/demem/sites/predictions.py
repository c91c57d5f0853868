"""Read the predictions of a step that runs anyway, wherever the step shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from demem.batch import as_logits
from demem.sites.find import find_head


def _never() -> bool:
    return False


class PredictionReader:
    """Read the predictions of a training, validation or test step without running the model a second time.

    In this order they are taken from ``"logits"`` or ``"preds"`` in what the step returns, from what the module's
    ``forward`` returned, and from what the classification head returned.  The head comes before ``forward`` where it is
    named, where ``forward`` returns (first) the embedding that the head reads, and where it returns the sigmoid of a
    single logit.  If ``forward`` runs more than once in a step, the last output with one row per example counts.

    ::

        reader = PredictionReader()
        reader.start(module)
        outputs = module.validation_step(batch, 0)
        predictions = reader.read(outputs, len(batch[1]))
        reader.stop()

    Args:
        head: qualified name of the classification head, if it cannot be found automatically.
        ignore: asked at every forward pass; passes for which it returns true are not read.
    """

    def __init__(self, head: str | None = None, ignore: Callable[[], bool] = _never) -> None:
        self.head = head
        self.ignore = ignore
        self._seen: dict[str, list[Any]] = {"module": [], "head": [], "read by the module": [], "read by the head": []}
        self._handles: list[RemovableHandle] = []

    def start(self, module: nn.Module) -> None:
        """Watch the module and its head until :meth:`stop`; what was seen before is forgotten.

        Raises:
            ValueError: the named head is not a linear layer of the module.
        """
        self.stop()
        try:
            _, head = find_head(module, self.head)
        except ValueError:
            if self.head is not None:
                raise
        else:
            self._handles.append(head.register_forward_hook(self._hook("head"), with_kwargs=True))
        self._handles.append(module.register_forward_hook(self._hook("module"), with_kwargs=True))

    def stop(self) -> None:
        """Take the hooks off and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for outputs in self._seen.values():
            outputs.clear()

    @property
    def ran(self) -> bool:
        """Whether the module or its head ran since :meth:`start`."""
        return bool(self._seen["module"] or self._seen["head"])

    def read(self, outputs: Any, size: int) -> Tensor:
        """Predictions of the step that ran since :meth:`start`.

        Args:
            outputs: what the step returned.
            size: number of examples B in its batch.

        Returns:
            Logits ``(B, C)``, or what the step returned as ``"preds"``: scores ``(B, C)`` or class indices ``(B,)``.

        Raises:
            RuntimeError: no predictions were seen.
        """
        if isinstance(outputs, Mapping):
            if isinstance(outputs.get("logits"), Tensor):
                return as_logits(outputs["logits"]).detach()
            preds = outputs.get("preds")
            if isinstance(preds, Tensor):
                return preds.detach()
        module, head = self._logits("module", size), self._logits("head", size)
        if head is not None and (self.head is not None or module is None or _is_sigmoid(module, head)):
            return head
        if head is not None and module is not None and self._is_read_by_the_head(module):
            return head
        if module is not None:
            return module
        raise RuntimeError(
            "demem saw no predictions in this step. Call self(x) in it and let it return the logits (B, C), return "
            "{'loss': …, 'logits': …} (or 'preds') from the step, or name the layer with head='…'."
        )

    def _hook(self, place: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        # A closure and no method: a copy of the model, made while a step runs, does not copy what was seen.
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self.ignore():
                self._seen[place].append(output)
                self._seen[f"read by the {place}"] += [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]

        return keep

    def was_given(self, value: Any) -> bool:
        """Whether the module's ``forward`` was called with this very tensor since :meth:`start`."""
        return any(x is value for x in self._seen["read by the module"])

    def _is_read_by_the_head(self, output: Tensor) -> bool:
        return any(x.shape == output.shape and torch.equal(x, output) for x in self._seen["read by the head"])

    def _logits(self, place: str, size: int) -> Tensor | None:
        for output in reversed(self._seen[place]):
            try:
                logits = as_logits(output)
            except (TypeError, ValueError):
                continue  # e.g. the loss, when DDP sends the whole step through forward
            if len(logits) == size:
                return logits.detach()
        return None


def _is_sigmoid(output: Tensor, logits: Tensor) -> bool:
    """Whether a single output, beside a column of zeros as in :func:`as_logits`, is the sigmoid of a single logit."""
    if output.shape != logits.shape or output.shape[1] != 2 or bool(output[:, 0].any() or logits[:, 0].any()):
        return False
    return torch.allclose(output[:, 1].float(), logits[:, 1].float().sigmoid(), atol=0.005)
