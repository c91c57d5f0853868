"""Read what the steps of a run give to the network, where that is not what its batches hold."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.trainer.states import RunningStage
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from demem.batch import call_model
from demem.run.data import RunData
from demem.run.head import require_deciding
from demem.run.loaders import as_step_batch
from demem.run.passes import device_batches, in_stage, read_inputs_by, undisturbed
from demem.sites import eager

_TOLERANCE = 0.01  # of the norm; autocast and fused kernels differ by less


def check_inputs(data: RunData) -> None:
    """Find out whether the validation step changes the inputs before the network reads them, and read them so, too.

    The step runs once on the first held-out batch, as in Lightning's sanity check, and what the head reads in it is
    compared with what it reads in a pass of demem's own.  If the two differ, further passes over the data (of this
    trainer) go through the step up to the network, whose inputs they take over.

    The step runs in evaluation mode, without logging, on a shallow copy of the module, so that what it appends to or
    counts is not the run's.  Nothing is compared where the step does not call the head, or fails by itself.

    Args:
        data: of the run.

    Raises:
        ValueError: the head reads something else in the step, and the step's inputs of the network do not explain it;
            the message names the way out.
    """
    trainer, pl_module = data.trainer, data.pl_module
    read_inputs_by(trainer, None)
    if data.held_out.loader is data.train.loader:  # there is no validation step
        return
    with undisturbed(trainer, pl_module):
        batch = next(islice(device_batches(trainer, pl_module, data.held_out.loader), 1), None)
        if not trainer.strategy.reduce_boolean_decision(batch is not None):  # the step may wait for all processes
            return
        assert batch is not None
        _, raw, (x, _, _) = batch
        steps, _ = _head_inputs(data, lambda: _step(trainer, pl_module, raw))
        same = not steps
        reason: str | None = None
        if steps:
            own, reason = _head_inputs(data, lambda: (call_model(data.model, x), call_model(data.model, x)))
            if reason is None and own:
                # A network that draws as it goes gives nothing to compare.
                same = not _same(own[0], own[-1]) or any(_same(a, b) for a in own for b in steps)
        if trainer.strategy.reduce_boolean_decision(same):
            return
        for module in _callable_parts(data):
            inputs = inputs_in_step(trainer, pl_module, module)
            seen, failed = _head_inputs(data, lambda read=inputs: call_model(data.model, read(raw)))  # type: ignore[misc]
            explains = same or (failed is None and any(_same(a, b) for a in seen for b in steps))
            if trainer.strategy.reduce_boolean_decision(explains):
                _check_labels(pl_module, raw, inputs)
                read_inputs_by(trainer, inputs)
                return
    # Perhaps the step calls a copy of the network (an average, a teacher), and the head is its.
    if trainer.strategy.reduce_boolean_decision(reason is None):
        require_deciding(trainer, pl_module, data.head_name, data.head, [x])
    found = "the head then reads something else" if reason is None else f"that fails ({reason})"
    raise ValueError(
        f"The validation step prepares the inputs of {type(data.model).__name__} (flattens, casts, scales …): demem "
        f"calls it with those of the batch, and {found}. Define `unpack_batch(self, batch)` on "
        f"{type(pl_module).__name__} and return (prepared x, y, group or None); let the steps call it, too."
    )


def inputs_in_step(trainer: pl.Trainer, pl_module: pl.LightningModule, module: nn.Module) -> Callable[[Any], Any]:
    """A function that gives what the validation step passes to ``module``, for a batch on the module's device."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) + len(kwargs) == 1:
            raise _Reached(next(iter((*args, *kwargs.values()))))
        raise _Reached(dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments))

    def read(batch: Any) -> Any:
        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with eager():
                _step(trainer, pl_module, batch)
        except _Reached as reached:
            return reached.inputs
        finally:
            handle.remove()
        raise ValueError(f"The validation step does not call {type(module).__name__}.")

    return read


def _check_labels(pl_module: pl.LightningModule, batch: Any, inputs: Callable[[Any], Any]) -> None:
    """Refuse batches such as ``(image, age, label)``, whose second part is an input of the network and no label."""
    if not isinstance(batch, list | tuple) or callable(getattr(pl_module, "unpack_batch", None)):
        return
    given = inputs(batch)
    values = given.values() if isinstance(given, Mapping) else [given]
    if any(isinstance(v, Tensor) and v.shape == batch[1].shape and torch.equal(v, batch[1]) for v in values):
        raise ValueError(
            "The network reads the second part of the batch, which demem takes for the labels. Define "
            f"`unpack_batch(self, batch)` on {type(pl_module).__name__} and return (inputs, labels, group or None); "
            "several inputs are a dict {parameter of forward: value}."
        )


class _Reached(Exception):
    """The step has come to the network; the rest of it is not needed."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs


def _callable_parts(data: RunData) -> list[nn.Module]:
    """What a step may call: the model, and the part of it that holds the head."""
    parts = [data.model]
    parts += [c for c in data.pl_module.children() if c is not data.head and any(m is data.head for m in c.modules())]
    return list(dict.fromkeys(parts))


def _head_inputs(data: RunData, run: Callable[[], Any]) -> tuple[list[Tensor], str | None]:
    """What the head reads while ``run`` runs, and why that failed; a step may fail after the head, for want of what
    other hooks of a validation give it."""
    seen: list[Tensor] = []
    handle = data.head_input.hook(lambda x: seen.append(x.detach().clone()))
    try:
        with eager():
            run()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        return seen, f"{type(error).__name__}: {error}"
    finally:
        handle.remove()
    return seen, None


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    return bool((a - b).norm() <= _TOLERANCE * b.norm()) or bool(a.isnan().any())  # NaN is refused elsewhere


def _step(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
    """Run the validation step on a shallow copy of the module, in the stage of a sanity check."""
    step = type(pl_module).validation_step
    parameters = inspect.signature(step).parameters.values()
    taken = len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) - 1
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        taken = 2
    # A step may pop from it, or change it in place.
    batch = apply_to_collection(as_step_batch(trainer, batch), Tensor, Tensor.clone)
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers() if not is_lazy(buffer)]
    try:
        with in_stage(trainer, RunningStage.SANITY_CHECKING):
            step(_shadow(pl_module), *(batch, 0, 0)[:taken])
    finally:
        for buffer, before in buffers:  # a step may count in one
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def _shadow(pl_module: pl.LightningModule) -> pl.LightningModule:
    """A copy with lists, dicts, sets and metrics of its own, which logs nothing, and everything else shared."""
    shadow = copy.copy(pl_module)
    kept = {id(t): t for t in (*pl_module.parameters(), *pl_module.buffers())}
    for name, value in vars(pl_module).items():
        if isinstance(value, list | dict | set) and not name.startswith("_"):
            shadow.__dict__[name] = copy.copy(value)
    shadow._buffers = dict(pl_module._buffers)
    shadow._modules = {
        name: copy.deepcopy(child, dict(kept)) if _counts(child) else child
        for name, child in pl_module._modules.items()
    }
    shadow._trainer = pl_module._trainer
    for name in ("log", "log_dict"):
        shadow.__dict__[name] = lambda *_, **__: None
    return shadow


def _counts(child: nn.Module | None) -> bool:
    return child is not None and any(isinstance(module, Metric) for module in child.modules())
