"""Cure the network of a run: the functions of :mod:`demem.removal` on what :class:`RunData` reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from demem.batch import apply_model
from demem.groups import Groups
from demem.linear import LinearHead, draw_evenly, few_of_each_group
from demem.removal import (
    ROWS,
    TRACED,
    UNDONE,
    Examples,
    Round,
    RoundRecord,
    as_trained,
    explain_round,
    fine_tune,
    gives_back,
    masked_units,
    ordinary_refit,
    remove_in_rounds,
    tuning_subset,
)
from demem.report import group_word, reason
from demem.run.data import RunData
from demem.run.head import read_head, write_head
from demem.run.loaders import batches_of, size_of
from demem.run.passes import undisturbed
from demem.run.processes import copy_first
from demem.sites import Gates, gives_logits, remove_gates
from demem.tracing import linear_score

FINE_TUNE_LR = 1e-4
FOLLOWS_THE_PROBE = "a refit would follow the early probe, and lose examples that it gets wrong"
HELD_OUT = 50_000  # held-out examples that the head is refitted on and judged by, where there are more

Choose = Callable[[Sequence[Round], Examples, Groups], int]


def remove_and_refit(
    data: RunData,
    groups: Groups,
    positions: Tensor,
    choose: Choose,
    shares: Sequence[float],
    passes: int,
    seed: int,
    score_units: Callable[..., Tensor] = linear_score,
    balanced: bool = False,
) -> tuple[list[RoundRecord], list[tuple[int, float]], int]:
    """Mask units that memorise, refit the head, and fine-tune the network.

    Where training drew inferred groups equally often and no refit over them is kept, an ordinary one undoes what that
    cost (:func:`demem.removal.ordinary_refit`).  Without a shortcut a refit on classes alone may lean on one that was
    not found: it is refused if it loses held-out examples that the early probe gets wrong, unless ``choose`` differs
    from demem's own choice.

    Args:
        data: of the run.
        groups: of its training and held-out examples.
        positions: ``(S,)`` of the training examples in their data set.
        choose: index of the round to keep.
        shares: see :func:`demem.removal.remove_in_rounds`.
        passes: of fine-tuning over the subset of the held-out examples; 0 leaves it out.
        seed: of all draws.
        score_units: see :func:`demem.removal.remove_in_rounds`.
        balanced: training drew the groups equally often, if there are any.

    Returns:
        what is known of each round, the masked units that the head reads with their scores
        (:func:`demem.removal.masked_units`), and how many examples the network was fine-tuned on.

    Raises:
        ValueError: the data are not those of the groups.
    """
    train, held_out, held_out_positions = read_examples(data, groups, positions, seed)
    rounds = remove_in_rounds(
        train,
        held_out,
        read_head(data.head),
        num_classes=data.num_classes,
        shares=shares,
        typical=groups.typical,
        score_units=score_units,
        join=groups.impure,
    )
    broadcast = data.trainer.strategy.broadcast
    chosen = _choice(data, choose, rounds, held_out, groups)
    why = broadcast(explain_round(chosen, rounds, held_out, groups.typical, **groups.trust))
    if chosen == 0 and why and balanced and groups.impure:
        ordinary = ordinary_refit(held_out, rounds[0], data.num_classes)
        if ordinary is not None and broadcast(gives_back(ordinary, rounds[0], held_out, groups.typical)):
            rounds.append(ordinary)
            chosen, why = len(rounds) - 1, UNDONE
    if chosen > 0 and why and groups.suspect is not None and not groups.informative:
        suspect = groups.suspect[_some_held_out(groups)]
        gains = (rounds[chosen].right.int() - rounds[0].right.int()).cpu()[suspect]
        if broadcast(int(gains.sum()) < 0):
            chosen, why = 0, FOLLOWS_THE_PROBE
    why = why or "choose() says so"
    records = broadcast(
        [round_.record(held_out.group, i == chosen, i > 0, why * (i == chosen)) for i, round_ in enumerate(rounds)]
    )
    if chosen == 0:
        return records, [], 0
    write_head(data.head, broadcast(rounds[chosen].head))
    gate = broadcast(rounds[chosen].gate)
    # On classes alone the features would lean on a shortcut all the more.
    passes = passes if groups.informative and not rounds[chosen].ordinary else 0
    units = broadcast(masked_units(rounds, chosen))
    return records, units, _fine_tune(data, held_out, held_out_positions, gate, passes, seed)


def refit_for_now(
    data: RunData, groups: Groups, choose: Choose, weights: Sequence[float]
) -> tuple[LinearHead | None, RoundRecord]:
    """A refitted head for a network that trains on, from one pass over the held-out examples.

    Args:
        data: of the run.
        groups: of its held-out examples; without a shortcut nothing is refitted.
        choose: index of the round to keep.
        weights: of an atypical example, see :func:`demem.removal.remove_in_rounds`.

    Returns:
        the head, ``None`` where the network's own stays, and what is known of it.

    Raises:
        ValueError: the data are not those of the groups.
    """
    broadcast, trained = data.trainer.strategy.broadcast, read_head(data.head)
    held_out, _ = _read_held_out(data, groups, "refitting")
    if not groups.informative:
        return None, broadcast(as_trained(held_out, trained).record(held_out.group, True, refitted=False))
    rounds = remove_in_rounds(
        held_out,
        held_out,
        trained,
        num_classes=data.num_classes,
        shares=(),
        weights=weights,
        typical=groups.typical,
    )
    chosen = _choice(data, choose, rounds, held_out, groups)
    record = broadcast(rounds[chosen].record(held_out.group, True, refitted=chosen > 0))
    return (broadcast(rounds[chosen].quick_head) if chosen else None), record


def _choice(data: RunData, choose: Choose, rounds: Sequence[Round], held_out: Examples, groups: Groups) -> int:
    """The index that ``choose`` gives, the same on all processes."""
    chosen = data.trainer.strategy.broadcast(choose(rounds, held_out, groups))
    if not isinstance(chosen, int) or not 0 <= chosen < len(rounds):
        raise ValueError(f"choose returned {chosen!r}; it must return the index of one of the {len(rounds)} rounds.")
    return chosen


def _read_held_out(data: RunData, groups: Groups, description: str) -> tuple[Examples, Tensor]:
    """What the head reads of the held-out examples, and their positions."""
    site = data.head_input
    rows = data.held_out.read([site], description, logits=True)
    if not torch.equal(rows.y.cpu(), groups.held_out_y):
        raise changed_data()
    if not gives_logits(read_head(data.head)(rows.activations[site.name]), rows.logits):
        raise ValueError(
            f"the head {data.head_name!r} gave the logits before training and no longer does by itself: another part "
            "of the network (LoRA, a residual branch that started at zero) takes part in them."
        )
    held_out = Examples(rows.activations[site.name], rows.y, groups.held_out.to(rows.y.device))
    if len(rows) <= HELD_OUT:
        return held_out, rows.position.cpu()
    some = _some_held_out(groups).to(rows.y.device)
    return Examples(*(values[some] for values in held_out)), rows.position[some].cpu()


def _some_held_out(groups: Groups) -> Tensor:
    """Which of the held-out examples are looked at: all of the small groups, and equally many of the others, so that
    balanced subsets are what they were."""
    if len(groups.held_out) <= HELD_OUT:
        return torch.arange(len(groups.held_out))
    return draw_evenly(groups.held_out, HELD_OUT, torch.Generator().manual_seed(0))


def describe_rounds(groups: Groups, rounds: Sequence[RoundRecord], fine_tuned_on: int) -> str:
    """What was done to the network, in one line.

    Args:
        groups: of the run.
        rounds: the network as trained first, as :func:`remove_and_refit` gives them.
        fine_tuned_on: held-out examples.
    """
    kept = next(record for record in rounds if record.chosen)
    why = reason(groups, rounds)
    if not kept.refitted:
        return f"demem: the network stays as it was trained{why}."
    tuned = f"fine-tuned on {fine_tuned_on}" if fine_tuned_on else "not fine-tuned on"
    alike = ", all held-out examples alike" * kept.ordinary
    return (
        f"demem: the head was refitted{alike} (cross-fitted accuracy on the worst {group_word(groups)}: "
        f"{rounds[0].worst:.2f} → {kept.worst:.2f}), {kept.share:.0%} of its inputs masked, and the network {tuned} "
        f"held-out examples{why}."
    )


def changed_parameters(pl_module: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the earlier values, on the CPU, that the module's parameters no longer have.

    >>> layer = nn.Linear(1, 1)
    >>> before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    >>> _ = layer.bias.data.add_(1)
    >>> list(changed_parameters(layer, before))
    ['bias']
    """
    now = dict(pl_module.named_parameters())
    return {name: value.cpu() for name, value in before.items() if not torch.equal(value, now[name])}


def write_parameters(pl_module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of these names; there may be none.

    >>> layer = nn.Linear(1, 1)
    >>> write_parameters(layer, {"bias": torch.tensor([7.0])})
    >>> float(layer.bias)
    7.0
    """
    if not values:  # before every training step but the first after a validation
        return
    parameters = dict(pl_module.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


@contextmanager
def swapped_parameters(pl_module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the parameters of these names have these values within the block.

    >>> layer = nn.Linear(1, 1)
    >>> before = float(layer.bias)
    >>> with swapped_parameters(layer, {"bias": torch.tensor([7.0])}):
    ...     float(layer.bias)
    7.0
    >>> float(layer.bias) == before
    True
    """
    parameters = dict(pl_module.named_parameters())
    saved = {name: parameters[name].detach().clone() for name in values}
    write_parameters(pl_module, values)
    try:
        yield
    finally:
        write_parameters(pl_module, saved)


@contextmanager
def restored_on_failure(
    pl_module: pl.LightningModule,
    consequence: str = "leaves the network as it was trained",
    part: nn.Module | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Put the parameters back and warn where the block fails: what goes wrong after training must not cost the run.
    An interrupt puts them back, too, and goes on.

    Gives ``{name: value}`` of the parameters before it.

    Args:
        pl_module: whose parameters may change.
        consequence: what the warning says of the remover.
        part: of the module, if nothing else can change.
    """
    own = {id(p) for p in (pl_module if part is None else part).parameters()}
    before = {name: p.detach().clone() for name, p in pl_module.named_parameters() if id(p) in own}
    try:
        yield before
    except BaseException as error:
        write_parameters(pl_module, before)
        if not isinstance(error, Exception):
            raise
        warnings.warn(
            f"MemorizationRemover {consequence}, because {type(error).__name__}: {error}",
            stacklevel=4,
        )


def read_examples(data: RunData, groups: Groups, positions: Tensor, seed: int) -> tuple[Examples, Examples, Tensor]:
    """What the head reads of some training examples of each group and of the held-out ones, and the latter's positions.

    The arguments are those of :func:`read_training_examples`.
    """
    return read_training_examples(data, groups, positions, seed), *_read_held_out(data, groups, "tracing")


def read_training_examples(data: RunData, groups: Groups, positions: Tensor, seed: int) -> Examples:
    """What the head reads of some training examples of each group.

    Args:
        data: of the run.
        groups: of its training and held-out examples.
        positions: ``(S,)`` of the training examples in their data set, ascending.
        seed: of the draw of training examples.

    Raises:
        ValueError: the data are not those of the groups.
    """
    site = data.head_input
    few = few_of_each_group(groups.index, TRACED, torch.Generator().manual_seed(seed)).sort().values
    few = few[draw_evenly(groups.index[few], ROWS, torch.Generator().manual_seed(seed))]
    if data.train.has_positions and size_of(data.train.loader) <= int(positions[-1]):
        raise changed_data()
    train = data.train.read([site], "tracing", only=positions[few])
    read = train.position.cpu()
    if not bool(torch.isin(read, positions).all()):
        raise changed_data()
    where = torch.searchsorted(positions, read)
    if not torch.equal(train.y.cpu(), groups.y[where]):
        raise changed_data()
    index = groups.index[where].to(train.y.device)
    return Examples(train.activations[site.name], train.y, index)


def changed_data() -> ValueError:
    """The error for data that are not those that groups were inferred for."""
    return ValueError(
        "The training or validation data is not what was there when training began. Use a new MemorizationRemover for "
        "other data, and a data set that gives its examples in the same order each time."
    )


def _fine_tune(data: RunData, held_out: Examples, positions: Tensor, gate: Tensor, passes: int, seed: int) -> int:
    """The number of examples that the network was fine-tuned on."""
    generator = torch.Generator().manual_seed(seed)
    subset = tuning_subset(held_out.group, held_out.y, data.num_classes, generator)
    split = data.held_out
    if passes == 0 or subset is None or not split.has_positions:
        return 0
    trainer, pl_module, site = data.trainer, data.pl_module, data.head_input
    chosen, size = positions[subset.cpu()], data.train.batch_size
    generator = torch.Generator().manual_seed(seed)
    orders = [chosen[torch.randperm(len(chosen), generator=generator)] for _ in range(passes)]
    parameters = trained_parameters(trainer, pl_module)
    with undisturbed(trainer, pl_module, grad=True):
        first = next(iter(split.batches_at(chosen[:2], 2)))
        if not apply_model(data.model, first.x).requires_grad:
            warnings.warn(
                "MemorizationRemover does not fine-tune the network: no gradient comes through its forward, which runs "
                "under torch.no_grad(). fine_tune=0 silences this.",
                stacklevel=2,
            )
            return 0
    gates = Gates([site])  # units that are masked stay so
    gates[site.name] = gate
    try:
        with undisturbed(trainer, pl_module, grad=True):
            result = fine_tune(
                data.model,
                parameters,
                (batch for order in orders for batch in split.batches_at(order, size)),
                steps=passes * len(batches_of(chosen, size)),
                lr=FINE_TUNE_LR,
                agree=trainer.strategy.reduce_boolean_decision,
            )
    finally:
        remove_gates(gates)
    if not result.kept:
        warnings.warn(
            f"Fine-tuning on held-out examples took their loss from {result.before:.3g} to {result.after:.3g}, so the "
            "weights are those before it. fine_tune=0 leaves it out.",
            stacklevel=2,
        )
        return 0
    copy_first(trainer, parameters)
    return len(chosen)


def trained_parameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Tensor]:
    """The parameters that the run's optimizers hold; all that ask for a gradient, if no optimizer is known."""
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    # A module that steps by itself may hide its optimizer.
    return [p for p in pl_module.parameters() if p.requires_grad and (id(p) in held or not held)]
