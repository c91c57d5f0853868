"""What is in the data: a shortcut, wrong labels or hard examples; asked of a network, without training it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from demem.batch import apply_model, unpack_batch
from demem.groups.inferred import Groups, infer_groups
from demem.groups.probe import ShortcutProbe, find_shortcut
from demem.groups.verdict import Verdict, closer_look, sketch
from demem.sites import ActivationReader, Site, check_finite, default_sites, find_head, find_sites
from demem.tracing import evaluating

EXAMPLES = 2_000  # read by default; the second opinion's time grows with their third power


@dataclass(frozen=True)
class Detection:
    """What :func:`detect` finds.

    Attributes:
        groups: of the examples, with the conclusion (:attr:`~demem.groups.Groups.shortcut`, ``kind`` and ``why``).
        verdict: on the probe's mistakes, with estimated shares and probabilities for each example.
        probe: whose cross-fitted logits ``(S, C)`` rank the examples, whatever the conclusion.
    """

    groups: Groups
    verdict: Verdict
    probe: ShortcutProbe

    @property
    def minority(self) -> Tensor:
        """Bool ``(S,)``: the examples on which the shortcut fails; none without a shortcut."""
        return self.groups.index != (self.groups.num_classes + 1) * self.groups.y

    def __repr__(self) -> str:
        groups = self.groups
        found = "a shortcut" if groups.shortcut else f"no shortcut ({groups.kind})"
        return (
            f"Detection({found} in {len(groups.y)} examples, {int(self.minority.sum())} of them in the minority; "
            f"probe of {groups.site!r}, error {groups.error:.2f}: {groups.why})"
        )


def probed_sites(model: nn.Module, layers: str | Sequence[str] | None = None, head: str | None = None) -> list[Site]:
    """The layers that are probed, shallow ones first.

    Args:
        model: with a linear head.
        layers: patterns (:func:`demem.sites.find_sites`); default the input of the first block or layer, and the
            outputs of blocks, stages or layers.
        head: name of the head, see :func:`demem.sites.find_head`.

    Raises:
        ValueError: as those two.

    >>> [site.name for site in probed_sites(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))]
    ['0:input', '0']
    """
    if layers is not None:
        return find_sites(model, layers)
    name, layer = find_head(model, head)
    sites = [site for site in default_sites(model, name) if site.module is not layer]
    if not sites:  # a linear model: the head's input is all there is
        return [Site(f"{name}:input", layer, "input", layer.in_features)]
    return [Site(f"{sites[0].name}:input", sites[0].module, "input"), *sites]


def detect(
    model: nn.Module,
    batches: Iterable[Any],
    layers: str | Sequence[str] | None = None,
    head: str | None = None,
    num_classes: int | None = None,
    max_examples: int = EXAMPLES,
) -> Detection:
    """Ask whether the labels of some data can be predicted by a shortcut, and who goes against it.

    This is what :class:`demem.callbacks.MemorizationRemover` does before it trains: an early layer is probed for the
    class, and a second, group-balanced predictor says whether the probe's mistakes are a minority, wrong labels or hard
    examples.  The network must not have been trained on these examples; pretrained or freshly initialised weights will
    do.  No group label is used.

    Args:
        model: in any mode and on any device; it is left as it was.
        batches: a ``DataLoader`` or any batches that :func:`demem.batch.unpack_batch` reads.  Shuffle them, as only the
            first ``max_examples`` examples are read.
        layers, head: see :func:`probed_sites`.
        num_classes: default the outputs of the head.
        max_examples: read at most so many.

    Raises:
        ValueError: there are no batches, a class has fewer than two examples, a label is out of range, or an activation
            is not finite.

    Example: the ink of these digits goes with the class for 95% of them.

        >>> from demem.data import make_spurious_digits
        >>> x, y, group = make_spurious_digits(0.95)[0].rows(torch.arange(900))
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 2))
        >>> found = detect(model, [(x, y)])
        >>> minority = (group == 1) | (group == 2)
        >>> found.groups.kind, float((found.minority == minority).float().mean()) > 0.99
        ('shortcut', True)
    """
    sites = probed_sites(model, layers, head)
    outputs = find_head(model, head)[1].out_features
    classes = max(2, outputs) if num_classes is None else num_classes
    features, sketches, y = _read(model, sites, batches, layers is None, max_examples)
    counts = torch.bincount(y, minlength=classes)
    if len(counts) > classes or int(counts.min()) < 2:
        raise ValueError(
            f"Labels must be 0 … {classes - 1}, with two examples of each class; the examples of each are "
            f"{counts.tolist()}. Shuffle the data, read more examples, or name the head."
        )
    probe = find_shortcut(features, y, classes)
    verdict = closer_look(probe.logits, [*features.values(), *sketches], y, classes)
    none = torch.zeros(0, dtype=torch.long)
    groups = infer_groups(probe, y, features[probe.site][:0], none.to(y.device)).judged(verdict)
    if groups.shortcut and verdict.noisy:
        groups = groups.without_wrong_labels(verdict.wrong_label, torch.zeros(0))
    return Detection(groups, verdict, probe)


def _read(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Any], optional: bool, max_examples: int
) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    """Pooled activations ``{site: (S, N)}``, random sums of whole ones, and labels ``(S,)``."""
    pooled: dict[str, list[Tensor]] = {}
    whole: dict[str, list[Tensor]] = {}
    shapes: dict[str, set[torch.Size]] = {}
    labels: list[Tensor] = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def sketched(site: Site, activation: Tensor) -> Tensor:
        shapes.setdefault(site.name, set()).add(activation.shape[1:])
        return sketch(activation)

    means = ActivationReader(sites, "mean", optional=optional)
    sums = ActivationReader(sites, sketched, optional=optional)
    with evaluating(model), torch.no_grad(), means, sums:
        for raw in batches:
            x, y, _ = batch = unpack_batch(raw, model)
            apply_model(model, _to(x, device))
            for reader, rows in ((means, pooled), (sums, whole)):
                for name, values in reader.pop().items():
                    if len(values) == len(batch.y):
                        rows.setdefault(name, []).append(check_finite(values.float(), f"layer {name!r}"))
            labels.append(y)
            if sum(map(len, labels)) >= max_examples:
                break
    if not labels:
        raise ValueError("There are no examples to read.")
    y = torch.cat(labels).to(device)[:max_examples]
    complete = {name: torch.cat(parts)[:max_examples] for name, parts in pooled.items() if len(parts) == len(labels)}
    if not complete:
        raise ValueError("No layer gives one row per example. Name others as layers.")
    extra = [torch.cat(parts)[:max_examples] for name, parts in whole.items() if len(shapes[name]) == 1]
    return complete, [rows for rows in extra if len(rows) == len(y)], y


def _to(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {key: _to(value, device) for key, value in x.items()}
    return type(x)(_to(value, device) for value in x) if isinstance(x, list | tuple) else x
