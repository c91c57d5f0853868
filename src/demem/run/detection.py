"""Infer the groups of a run's examples: the functions of :mod:`demem.groups` on what :class:`RunData` reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from demem.groups import (
    Groups,
    ShortcutProbe,
    class_error,
    closer_look,
    infer_groups,
    known_groups,
    probed_sites,
    wrong_labels,
)
from demem.metrics import require_groups
from demem.run.cure import changed_data
from demem.run.data import Rows, RunData
from demem.run.head import read_head
from demem.run.loaders import evenly_spaced
from demem.sites import Site

CHOSEN_ON = 20_000  # training examples that the probed layer is chosen on: those of all layers are in memory at once
JUDGED_ON = 2_000  # training examples that the verdict is found on; its time grows with their square and cube
LEARNED_ON, AT_CHANCE = 2_000, 0.8  # the network counts as untrained while its error on 2,000 exceeds 0.8 × chance

Detect = Callable[[Mapping[str, Tensor], Tensor, int], ShortcutProbe]


def infer_groups_of_run(
    data: RunData,
    layers: str | Sequence[str] | None,
    detect: Detect,
    use_groups: bool,
    epoch: int,
    before: Sequence[Tensor] = (),
) -> tuple[Groups, Tensor, list[Tensor]]:
    """Probe the layers on the training examples, and give these and the held-out examples a group.

    Where there are more than 20,000 training examples, the layer is chosen on that many, and then read of all.  What
    the probe gets wrong is judged on 2,000 of them (:func:`demem.groups.judge`).  If that finds wrong labels beside a
    shortcut, before training, one more pass over the held-out examples judges each label (at most 20,000 of both sets).

    Args:
        data: of the run.
        layers: patterns (:func:`demem.sites.find_sites`) of the layers to probe, shallow ones first; ``None`` takes the
            input of the first block or layer, and the outputs of those blocks, stages or layers that run.
        detect: gives the probe for ``{site: (S, N)}``, classes and their number, as :func:`demem.groups.find_shortcut`.
        use_groups: the true groups of the held-out examples are used.
        epoch: epochs of training that went before.
        before: the features that were judged on before training, as the first call returned them.  A network that has
            trained on wrong labels sides with them, and one that has learned a shortcut no longer shows the class.

    Returns:
        the groups, the same on all processes, positions ``(S,)`` of the training examples in their data set, and the
        features that were judged on.

    Raises:
        ValueError: labels out of range, a class with fewer than two examples, groups asked for but not in the batches,
            or as :meth:`demem.run.Split.read`.
    """
    what, classes, optional = "finding the shortcut", data.num_classes, layers is None
    sites = probed_sites(data.pl_module, layers, data.head_name)
    first = data.train.read(sites, what, sketches=not (use_groups or before), optional=optional, limit=CHOSEN_ON)
    probe, train, site = _probe(data, first, sites, detect, optional, what)
    held_out = data.held_out.read([site], what, optional=optional)
    check_classes(held_out.y, classes, "validation")
    features = held_out.activations[site.name]
    judged_on: list[Tensor] = []
    if not use_groups:
        groups = infer_groups(probe, train.y, features, held_out.y, epoch)
        some = _some(first, classes)
        if len(some):
            seen = [*first.activations.values(), *first.sketches.values()]
            judged_on = list(before) or [rows[some] for rows in seen]
            here = torch.searchsorted(train.position, first.position[some])
            verdict = closer_look(probe.logits[here], judged_on, first.y[some], classes, trained=bool(before))
            groups = groups.judged(verdict)
            # All processes or none read once more; a network that has trained on wrong labels sides with them.
            if data.trainer.strategy.broadcast(groups.shortcut and verdict.noisy and epoch == 0):
                groups = _without_wrong_labels(data, groups, probe, train, held_out, first, sites, optional, what)
    elif held_out.group is None:
        raise ValueError(
            "use_groups=True, but the validation batches carry no groups. Yield (x, y, group), or set use_groups=False."
        )
    else:
        group = numbered(held_out.group)
        groups = known_groups(probe, train.activations[site.name], train.y, features, held_out.y, group, epoch)
    # What follows from the groups must be the same on all processes, and rounding differs between devices.
    return data.trainer.strategy.broadcast(groups), train.position.cpu(), judged_on


def numbered(group: Tensor) -> Tensor:
    """The groups of some examples with indices from 0, where they are large identifiers (zip codes, hashes).

    Raises:
        ValueError: as :func:`demem.metrics.require_groups`.

    Example:
        >>> numbered(torch.tensor([80331, 10115, 80331]))
        tensor([1, 0, 1])
    """
    ids, index, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    require_groups(sizes)
    return index if int(ids[-1]) >= len(group) else group


def _without_wrong_labels(
    data: RunData,
    groups: Groups,
    probe: ShortcutProbe,
    train: Rows,
    held_out: Rows,
    first: Rows,
    sites: Sequence[Site],
    optional: bool,
    what: str,
) -> Groups:
    """The same groups, where examples whose labels are probably wrong count as typical, as do mistakes of the probe
    among the examples that not all layers are read of: beyond 20,000 (the training examples ``first``, and as many
    held-out ones)."""
    some = data.held_out.read(sites, what, sketches=True, optional=optional, limit=CHOSEN_ON)
    here = torch.searchsorted(train.position, first.position)
    there = torch.searchsorted(held_out.position, some.position)
    shown = [
        torch.cat([rows, of_some[name]])
        for of_first, of_some in ((first.activations, some.activations), (first.sketches, some.sketches))
        for name, rows in of_first.items()
        if name in of_some
    ]
    if not torch.equal(held_out.position[there.clamp(max=len(held_out) - 1)], some.position):
        raise changed_data()  # a stream
    early = torch.cat([probe.logits[here], probe.head(held_out.activations[probe.site][there])])
    wrong = wrong_labels(early, shown, torch.cat([first.y, some.y]), data.num_classes, [len(first), len(some)])
    of_train, of_held_out = (torch.ones(len(rows), device=wrong.device) for rows in (train, held_out))
    of_train[here], of_held_out[there] = wrong[: len(first)], wrong[len(first) :]
    return groups.without_wrong_labels(of_train, of_held_out)


def _some(rows: Rows, num_classes: int) -> Tensor:
    """Indices of the examples that are judged: 2,000 evenly spaced, of classes with two of them."""
    some = evenly_spaced(torch.arange(len(rows)), JUDGED_ON).to(rows.y.device)
    return some[torch.bincount(rows.y[some], minlength=num_classes)[rows.y[some]] >= 2]


def describe_groups(groups: Groups, looks_again: bool = False, rebalance: bool = True) -> str:
    """What was found, and what follows from it, in one line.

    Args:
        groups: that were inferred.
        looks_again: the network is probed again after an epoch.
        rebalance: training draws the groups equally often.
    """
    if looks_again:
        found = "does not say whether there is a shortcut; the network is probed again after an epoch"
    elif groups.shortcut:
        found = "follows a shortcut" + ", so that training draws the inferred groups equally often" * rebalance
    elif groups.known:
        found = "follows no shortcut"
    else:
        found = f"follows no shortcut ({groups.kind}), so that the network is trained as it would be without demem"
    return f"demem: the probe of {groups.site!r} (error {groups.error:.2f}) {found}."


def has_learned(data: RunData) -> bool:
    """Whether the network does better than chance on what it is trained on; else it leans on nothing yet."""
    rows = data.train.read([data.head_input], "probing", limit=LEARNED_ON)
    error = class_error(read_head(data.head)(rows.activations[data.head_input.name]), rows.y)
    learned: bool = data.trainer.strategy.broadcast(error < AT_CHANCE * (1 - 1 / data.num_classes))
    return learned


def check_classes(y: Tensor, num_classes: int, where: str) -> None:
    """Refuse labels that the head does not have, and classes with fewer than two examples.

    Args:
        y: ``(S,)`` class indices.
        num_classes: of the head.
        where: name of the data, for the message.
    """
    check_range(y, num_classes, where)
    few = [c for c, n in enumerate(torch.bincount(y, minlength=num_classes).tolist()) if n < 2]
    if few:
        raise ValueError(
            f"Of class {few} there are fewer than two among the {len(y)} {where} examples, so its units cannot be "
            f"traced. Use a {where} set with every class (are the batches limited, or the set sorted by class?)."
        )


def check_range(y: Tensor, num_classes: int, where: str) -> None:
    """Refuse labels that the head does not have; the arguments are those of :func:`check_classes`."""
    if int(y.max()) >= num_classes:
        raise ValueError(f"Label {int(y.max())} in the {where} data is out of range: the head has {num_classes}.")


def _probe(
    data: RunData, rows: Rows, sites: Sequence[Site], detect: Detect, optional: bool, what: str
) -> tuple[ShortcutProbe, Rows, Site]:
    """The probe, the training examples with the activations that it reads, and its site."""
    classes = data.num_classes
    check_range(rows.y, classes, "training")
    whole = len(rows) < CHOSEN_ON
    if whole or int(torch.bincount(rows.y, minlength=classes).min()) > 1:
        check_classes(rows.y, classes, "training")
        probe = detect(rows.activations, rows.y, classes)
        chosen = data.trainer.strategy.broadcast(probe.site)
        sites = [site for site in sites if site.name == chosen]
        if chosen != probe.site:  # rounding differs between devices
            probe = detect({chosen: rows.activations[chosen]}, rows.y, classes)
    if not whole:
        rows = data.train.read(sites, what, optional=optional)
        check_classes(rows.y, classes, "training")
        probe = detect(rows.activations, rows.y, classes)
    return probe, rows, next(site for site in sites if site.name == probe.site)
