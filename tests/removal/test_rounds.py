from dataclasses import replace

import numpy as np
import pytest
import torch

from demem.groups import largest_groups
from demem.linear import LinearHead, average_heads, fit_balanced
from demem.removal import (
    Examples,
    as_trained,
    choose_round,
    clearly_better,
    explain_round,
    memorization_weight,
    purify,
    remove_in_rounds,
    worst_group,
    worth_its_cost,
)


def _examples(n, share, seed, width=40):
    """Half of the units show the class with noise, half a spurious attribute with less."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=generator)
    a = torch.where(torch.rand(n, generator=generator) < share, y, 1 - y)
    signal = torch.cat([(2.0 * y[:, None] - 1).expand(n, width // 2), (2.0 * a[:, None] - 1).expand(n, width // 2)], 1)
    noise = torch.randn(n, width, generator=generator) * torch.tensor([3.0, 1.0]).repeat_interleave(width // 2)
    return Examples(signal + noise, y, torch.zeros_like(y)), 2 * y + a


def _head(examples):
    return LinearHead(torch.zeros(2, examples.features.shape[1]), torch.zeros(2))


def test_masks_the_spurious_units_and_lifts_the_worst_group():
    train, _ = _examples(2000, 0.98, 0)
    held_out, group = _examples(60, 0.5, 1)  # few: a head that reads all units fits their noise
    test, test_group = _examples(4000, 0.5, 2)
    held_out = held_out._replace(group=group)
    typical = torch.tensor([0, 3])
    rounds = remove_in_rounds(
        train, held_out, _head(train), num_classes=2, shares=(0.25, 0.5, 0.9), weights=(1,), typical=typical
    )
    before, _ = worst_group(rounds[1].head(test.features), test.y, test_group)
    half = rounds[3]
    assert int((half.gate[20:] == 0).sum()) >= 19  # the 20 spurious ones, or all but one
    after, _ = worst_group(half.head(test.features), test.y, test_group)
    assert after > before + 0.03
    for r, share in zip(rounds[1:], (0, 0.25, 0.5, 0.9), strict=True):
        assert int((r.gate == 0).sum()) == round(share * 40)
        assert (r.head.weight[:, r.gate == 0] == 0).all()
    assert (rounds[2].gate >= rounds[3].gate).all()  # masks only grow


def test_held_out_accuracy_is_judged_without_the_example():
    """Labels that nothing tells cannot be predicted."""
    train, _ = _examples(100, 0.5, 0, width=200)
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, 2, (120,), generator=generator)
    held_out = Examples(torch.randn(120, 200, generator=generator), y, torch.zeros_like(y))
    rounds = remove_in_rounds(train, held_out, _head(train), num_classes=2, shares=(), l2=1e-6)
    assert rounds[1].worst < 0.7


def _rounds(worst, standard_error=0.1):
    train, group = _examples(200, 0.9, 0)
    train = train._replace(group=group)
    rounds = remove_in_rounds(train, train, _head(train), num_classes=2, shares=(0.2, 0.4), weights=(1,))
    refits = [replace(r, worst=w, standard_error=standard_error) for r, w in zip(rounds[1:], worst, strict=True)]
    return [rounds[0], *refits], train, largest_groups(train.y, train.group, 2)


def _impure(seed, n=400):
    """Inferred groups of a slice in which the minority is rare: half of those inferred as minority are typical."""
    examples, group = _examples(n, 0.95, seed)
    wrongly = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.05
    attribute = torch.where(wrongly, 1 - group % 2, group % 2)
    return examples._replace(group=2 * examples.y + attribute)


def test_weight_of_atypical_examples_makes_up_for_impure_groups():
    train, held_out = _impure(0), _impure(1)
    test, test_group = _examples(4000, 0.5, 2)
    typical = torch.tensor([0, 3])
    rounds = remove_in_rounds(train, held_out, _head(train), num_classes=2, shares=(0.5,), typical=typical)
    assert [r.weight for r in rounds[:5]] == [1, 1, 3, 10, 30]
    worst = {r.weight: worst_group(r.head(test.features), test.y, test_group)[0] for r in rounds[1:5]}
    assert max(worst[3], worst[10]) > worst[1] + 0.02
    best = max(rounds[1:5], key=lambda r: r.worst)
    assert rounds[5].weight == best.weight  # the masked rounds keep it
    assert rounds[choose_round(rounds[:5], held_out, typical)] is best


def test_without_enough_atypical_examples_there_is_one_weight():
    train, _ = _examples(200, 0.9, 0)
    rounds = remove_in_rounds(train, train, _head(train), num_classes=2, shares=())
    assert [r.weight for r in rounds] == [1, 1]
    for atypical, weights in ((9, [1, 1]), (10, [1, 1, 3, 10, 30])):
        group = train.y.clone()
        for c in (0, 1):
            group[(train.y == c).nonzero()[:atypical, 0]] = 2 + c
        rounds = remove_in_rounds(
            train, train._replace(group=group), _head(train), num_classes=2, shares=(), typical=torch.tensor([0, 1])
        )
        assert [r.weight for r in rounds] == weights


def test_of_equal_weights_the_smallest():
    rounds, held_out, typical = _rounds((0.7, 0.5, 0.5))
    heavier = [replace(r, share=0.0, weight=w, worst=0.7) for r, w in zip(rounds[1:], (1, 3, 10), strict=True)]
    assert choose_round([rounds[0], *heavier], held_out, typical) == 1


def test_masks_least_within_one_standard_error():
    assert choose_round(*_rounds((0.5, 0.65, 0.7))) == 2
    assert choose_round(*_rounds((0.5, 0.65, 0.7)), tolerance=0) == 3
    assert choose_round(*_rounds((0.5, 0.65, 0.7), standard_error=0.01)) == 3


def test_stays_as_trained_where_the_refit_has_nothing_to_go_by():
    rounds, held_out, typical = _rounds((0.7, 0.6, 0.6))
    everything, nothing = torch.ones(200, dtype=torch.bool), torch.zeros(200, dtype=torch.bool)
    refit_wins = [replace(r, right=everything if i else nothing) for i, r in enumerate(rounds)]
    trained_wins = [replace(r, right=nothing if i else everything) for i, r in enumerate(rounds)]
    same = [replace(r, right=everything) for r in rounds]
    # Groups that are known and large enough: refit, unless the network as trained is clearly better.
    assert choose_round(refit_wins, held_out, typical) == choose_round(same, held_out, typical) == 1
    assert choose_round(trained_wins, held_out, typical) == 0
    few = torch.where(held_out.atypical(typical) & (torch.arange(200) > 60), typical[held_out.y], held_out.group)
    assert held_out._replace(group=few).fewest_atypical(typical) < 5  # too few to tell
    assert choose_round(trained_wins, held_out._replace(group=few), typical) == 1
    # Unknown, or several atypical ones to a class and most with fewer than 5 examples, or none, or a single
    # atypical example of a class: only if clearly better.
    atypical = held_out.group != typical[held_out.y]
    split = torch.where(atypical, 4 + torch.arange(200), held_out.group)
    none = typical[held_out.y]
    # One small atypical group to a class is no reason.
    small = torch.where(atypical & (torch.arange(200) > 60), typical[held_out.y], held_out.group)
    assert choose_round(same, held_out._replace(group=small), typical) == 1
    one = torch.where(atypical & (held_out.y == 0), none, held_out.group)
    one[(held_out.y == 0).nonzero()[0]] = 1 - none[held_out.y == 0][0]
    for group, known in ((held_out.group, False), (split, True), (none, True), (one, True)):
        few = held_out._replace(group=group)
        assert choose_round(refit_wins, few, typical, groups_known=known) == 1
        assert choose_round(trained_wins, few, typical, groups_known=known) == 0
        assert choose_round([replace(r, right=everything) for r in rounds], few, typical, groups_known=known) == 0


def test_the_first_round_is_the_network_as_trained():
    train, group = _examples(200, 0.9, 0)
    head = LinearHead(torch.randn(2, 40, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, -0.1]))
    held_out = train._replace(group=group)
    first = remove_in_rounds(train, held_out, head, num_classes=2, shares=())[0]
    assert first.head is head
    assert torch.equal(first.right, (train.features @ head.weight.T + head.bias).argmax(1) == train.y)
    assert first.worst == worst_group(head(train.features), train.y, group)[0]


def test_worst_group_leaves_out_groups_too_small_to_judge():
    logits = torch.tensor([[1.0, 0.0]]).repeat(22, 1)
    y = torch.tensor([0] * 20 + [1, 1])
    group = torch.tensor([0] * 10 + [1] * 10 + [2, 2])
    assert worst_group(logits, y, group)[0] == 1.0
    assert worst_group(logits[20:], y[20:], group[20:])[0] == 0.0


def test_the_typical_group_of_a_class_is_its_largest():
    y = torch.tensor([0, 0, 0, 1, 1, 1, 3])
    group = torch.tensor([0, 0, 1, 2, 3, 3, 6])
    assert largest_groups(y, group, 4).tolist() == [0, 3, -1, 6]


def test_atypical_examples_are_those_of_other_groups_than_the_typical_one():
    train, group = _examples(2000, 0.98, 0)
    held_out, held_group = _examples(200, 0.5, 1)
    held_out, typical = held_out._replace(group=held_group), largest_groups(train.y, group, 2)
    by_group, swapped = (
        remove_in_rounds(train, held_out, _head(train), num_classes=2, shares=(0.5,), typical=groups)[-1]
        for groups in (typical, torch.tensor([1, 2]))
    )
    assert float(by_group.gate[20:].mean()) == 0  # what misleads on the minority is the spurious half
    assert float(swapped.gate[20:].mean()) > 0


def test_clearly_better_is_a_paired_test_over_cells():
    """Against the z-test written out with numpy."""
    generator = torch.Generator().manual_seed(0)
    cell = torch.randint(0, 3, (300,), generator=generator)
    cell[:4] = 3  # too few to count, and all lost
    right = torch.rand(300, generator=generator) < 0.9
    right[:4] = False
    seen = set()
    for lost in (0.0, 0.01, 0.02, 0.05, 0.2):
        than = right & (torch.rand(300, generator=generator) >= lost)
        than[:4] = True
        d, k = (right.float() - than.float()).numpy(), cell.numpy()
        rows = [d[k == c] for c in range(3)]
        variances = [(((row - row.mean()) ** 2).sum() + 2) / (len(row) + 2) for row in rows]
        error = np.sqrt(sum(v / len(row) for v, row in zip(variances, rows, strict=True))) / 3
        expected = bool(np.mean([row.mean() for row in rows]) / error > 1.645)
        seen.add(expected)
        assert clearly_better(right, than, cell) == expected
    assert seen == {True, False}
    assert not clearly_better(than, right, cell)
    assert not clearly_better(right, right, cell)


def test_a_few_examples_are_not_clearly_better():
    right, than = torch.tensor([True] * 6), torch.tensor([True] * 5 + [False])
    assert not clearly_better(right, than, torch.zeros(6, dtype=torch.long))
    assert clearly_better(right.repeat(50), than.repeat(50), torch.zeros(300, dtype=torch.long))


def _cells(*accuracies, sizes=(200, 20, 200, 20)):
    """Answers of two heads, classes and who is atypical, from (before, after) in four cells: class 0 typical, class 0
    atypical, class 1 typical, class 1 atypical.  Of equal answers as many as can be are of the same examples."""
    than, right, y, atypical = [], [], [], []
    for i, ((before, after), size) in enumerate(zip(accuracies, sizes, strict=True)):
        than.append(torch.arange(size) < round(before * size))
        right.append(torch.arange(size) < round(after * size))
        y.append(torch.full((size,), i // 2))
        atypical.append(torch.full((size,), i % 2 == 1))
    return torch.cat(right), torch.cat(than), torch.cat(y), torch.cat(atypical)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (((1, 0.9), (0.2, 0.7), (1, 0.9), (0.3, 0.8)), True),  # a shortcut
        (((1, 0.7), (0.0, 0.3), (1, 0.7), (0.0, 0.3)), True),  # no gain on average, but the network is misled
        (((1, 0.7), (0.0, 0.2), (1, 0.7), (0.0, 0.2)), False),  # wrong labels: a bargain for the worst group alone
        (((1, 0.84), (0.6, 0.75), (1, 0.84), (0.6, 0.75)), False),  # hard examples: the same, and not misled
        (((1, 0.99), (0.9, 0.9), (1, 0.99), (0.9, 0.95)), True),  # nearly for nothing
        (((1, 0.97), (0.9, 0.9), (1, 0.99), (0.9, 0.95)), False),  # but one class pays
        (((1, 0.99), (0.9, 0.85), (1, 0.99), (0.9, 0.85)), True),  # cheap, and only chance speaks against it
        (((1, 0.99), (0.9, 0.6), (1, 0.99), (0.9, 0.6)), False),  # cheap, and clearly worse
    ],
)
def test_a_refit_for_a_doubtful_shortcut_must_be_worth_its_cost(cells, expected):
    right, than, y, atypical = _cells(*cells)
    assert worth_its_cost(right, than, y, atypical) == expected


def test_too_few_atypical_examples_speak_against_no_refit():
    cells = ((1, 0.7), (0, 0), (1, 0.7), (0, 0))
    assert worth_its_cost(*_cells(*cells, sizes=(200, 4, 200, 4)))
    assert not worth_its_cost(*_cells(*cells, sizes=(200, 5, 200, 4)))


def test_only_a_doubtful_shortcut_must_be_worth_the_cost():
    rounds, held_out, typical = _rounds((0.7, 0.6, 0.6))
    atypical = held_out.atypical(typical)
    dear = torch.where(atypical, torch.arange(200) % 8 > 0, torch.arange(200) % 9 > 0)
    rounds = [replace(r, right=dear if i else torch.where(atypical, dear, True)) for i, r in enumerate(rounds)]
    assert choose_round(rounds, held_out, typical, doubtful=True) == 0
    assert not clearly_better(rounds[0].right, dear, 2 * held_out.y + atypical)
    assert choose_round(rounds, held_out, typical) == 1


REASONS = [
    (
        {"doubtful": True},
        ((1, 0.9), (0.2, 0.7), (1, 0.9), (0.3, 0.8)),
        1,
        "gains the atypical examples that are alike more",
    ),
    ({"doubtful": True}, ((1, 0.85), (0.0, 0.2), (1, 0.9), (0.5, 0.2)), 0, "would cost the typical examples more"),
    (
        {"doubtful": True},
        ((1, 0.7), (0.0, 0.2), (1, 0.7), (0.0, 0.2)),
        0,
        "cost the average more than it gains the worst",
    ),
    ({"doubtful": True}, ((1, 0.99), (0.9, 0.9), (1, 0.99), (0.9, 0.95)), 1, "costs the typical examples hardly"),
    ({"doubtful": True}, ((1, 0.97), (0.9, 0.95), (1, 1), (0.95, 0.95)), 0, "hardly gain more than that"),
    ({"doubtful": True}, ((1, 0.7), (0.0, 0.3), (1, 0.7), (0.0, 0.3)), 1, "gets most of the atypical examples wrong"),
    ({}, ((1, 0.5), (0.5, 0.5), (1, 0.5), (0.5, 0.5)), 0, "would cost the typical examples more"),
    ({}, ((1, 0.9), (0.9, 0.9), (1, 1), (0.9, 1)), 1, "not clearly worse"),
    ({"groups_known": False}, ((1, 1), (1, 1), (1, 1), (1, 1)), 0, "no shortcut to go by, and a refit is not clearly"),
    ({"groups_known": False}, ((1, 0.9), (0.9, 1), (0.1, 1), (0.1, 1)), 0, "a class would lose by a refit"),
    ({"groups_known": False}, ((0.5, 0.9), (0.5, 0.9), (0.5, 0.9), (0.5, 0.9)), 1, "on average over the classes"),
]


@pytest.mark.parametrize(("options", "cells", "kept", "words"), REASONS)
def test_a_choice_says_why(options, cells, kept, words):
    right, than, y, atypical = _cells(*cells)
    rounds = _rounds((0.7, 0.6, 0.6))[0][:2]
    held_out, typical = Examples(torch.zeros(len(y), 40), y, 2 * y + atypical), torch.tensor([0, 2])
    rounds = [replace(r, right=n, group=held_out.group) for r, n in zip(rounds, (than, right), strict=True)]
    assert choose_round(rounds, held_out, typical, **options) == kept
    assert words in explain_round(kept, rounds, held_out, typical, **options)
    assert explain_round(1 - kept, rounds, held_out, typical, **options) == ""  # somebody else's choice


@pytest.mark.parametrize(
    ("accuracy", "after", "number", "impure", "kept"),
    [
        (0.7, 0.85, 20, True, 0),  # nothing misleads the network much, and a refit costs a seventh
        (0.6, 0.85, 20, True, 1),  # it is misled
        (0.7, 0.92, 20, True, 1),  # the refit costs less
        (0.7, 0.85, 9, True, 1),  # too few atypical examples to say so
        (0.7, 0.85, 20, False, 1),  # the groups are known
    ],
)
def test_a_refit_of_inferred_groups_must_not_be_dear_if_the_network_is_hardly_misled(
    accuracy, after, number, impure, kept
):
    sizes = (200, number, 200, number)
    right, than, y, atypical = _cells((1, after), (accuracy, 0.95), (1, after), (accuracy, 0.95), sizes=sizes)
    held_out, typical = Examples(torch.zeros(len(y), 40), y, 2 * y + atypical), torch.tensor([0, 2])
    rounds = _rounds((0.7, 0.6, 0.6))[0][:2]
    rounds = [replace(r, right=n, group=held_out.group) for r, n in zip(rounds, (than, right), strict=True)]
    assert choose_round(rounds, held_out, typical, impure=impure) == kept
    assert ("right, and a refit would cost" in explain_round(0, rounds, held_out, typical, impure=impure)) == (not kept)
    if number >= 10 and impure:
        assert worth_its_cost(right, than, y, atypical) == bool(kept)


def test_where_the_atypical_examples_are_many_their_gain_is_worth_a_tenth_of_the_typical_ones():
    right, than, y, atypical = _cells((1, 0.85), (0.7, 0.95), (1, 0.85), (0.7, 0.95), sizes=(100, 100, 100, 100))
    held_out, typical = Examples(torch.zeros(len(y), 40), y, 2 * y + atypical), torch.tensor([0, 2])
    rounds = _rounds((0.7, 0.6, 0.6))[0][:2]
    rounds = [replace(r, right=n, group=held_out.group) for r, n in zip(rounds, (than, right), strict=True)]
    assert choose_round(rounds, held_out, typical, impure=True) == 1
    assert choose_round(rounds, held_out, typical, impure=True, doubtful=True) == 1


def test_a_choice_with_few_atypical_examples_says_so():
    _, than, y, atypical = _cells((1, 1), (1, 1), (1, 1), (1, 1), sizes=(40, 1, 40, 1))
    held_out = Examples(torch.zeros(len(y), 40), y, 2 * y + atypical)
    rounds = [replace(r, right=than, group=held_out.group) for r in _rounds((0.7, 0.6, 0.6))[0][:2]]
    assert "too few atypical examples to go by" in explain_round(0, rounds, held_out, torch.tensor([0, 2]))


def test_what_a_refit_gives_is_judged_by_the_purer_groups():
    # 40 examples of each class are inferred as atypical: a refit gains the 14 that are, and costs the hard ones.
    right, than, y, inferred = _cells((1, 0.9), (0.6, 0.55), (1, 0.9), (0.6, 0.55), sizes=(200, 40, 200, 40))
    place = torch.arange(len(y)) % 240 - 200
    purer = inferred & (place < 14)
    than = torch.where(inferred, place >= 14, than)
    right = torch.where(inferred, (place < 12) | (place >= 34), right)
    held_out, typical = Examples(torch.zeros(len(y), 40), y, 2 * y + inferred), torch.tensor([0, 2])
    assert not worth_its_cost(right, than, y, inferred)
    assert worth_its_cost(right, than, y, inferred, purer)
    for group, kept in ((held_out.group, 0), (2 * y + purer, 1)):
        rounds = [replace(r, group=group) for r in _rounds((0.7, 0.6, 0.6))[0][:2]]
        rounds = [replace(r, right=n) for r, n in zip(rounds, (than, right), strict=True)]
        assert choose_round(rounds, held_out, typical, doubtful=True) == kept
        assert choose_round(rounds, held_out, typical) == kept  # clearly worse by the groups as they were inferred


def test_a_minority_that_does_not_hold_together_is_no_reason_to_lose_typical_examples():
    right, than, y, inferred = _cells((1, 0.8), (0.5, 1), (1, 0.8), (0.5, 1), sizes=(200, 20, 200, 20))
    held_out, typical = Examples(torch.zeros(len(y), 40), y, 2 * y + inferred), torch.tensor([0, 2])
    few = inferred & (torch.arange(len(y)) % 220 < 202)  # two of each class are like each other
    for group, kept in ((held_out.group, 1), (2 * y + few, 0)):
        rounds = [replace(r, group=group) for r in _rounds((0.7, 0.6, 0.6))[0][:2]]
        rounds = [replace(r, right=n) for r, n in zip(rounds, (than, right), strict=True)]
        assert choose_round(rounds, held_out, typical) == kept


def test_rounds_of_impure_groups_are_judged_by_purer_ones():
    train, held_out, typical = _impure(0, 2000), _impure(1), torch.tensor([0, 3])
    trained = LinearHead(torch.cat([torch.zeros(2, 20), torch.tensor([[-1.0], [1]]).expand(2, 20)], 1), torch.zeros(2))
    rounds = remove_in_rounds(train, held_out, trained, num_classes=2, shares=(0.5,), typical=typical, join=True)
    purer = purify(held_out, train, typical).group
    assert not torch.equal(purer, held_out.group)
    assert all(torch.equal(r.group, purer) for r in rounds)
    assert all(r.worst == min(float(r.right[purer == g].float().mean()) for g in range(4)) for r in rounds)
    record = rounds[1].record(held_out.group, chosen=True, refitted=True)  # what is told compares with other epochs
    assert record.worst == min(float(rounds[1].right[held_out.group == g].float().mean()) for g in range(4))
    assert record.worst != rounds[1].worst
    plain = remove_in_rounds(train, held_out, trained, num_classes=2, shares=(), typical=typical)
    assert all(torch.equal(r.group, held_out.group) for r in plain)


@pytest.mark.parametrize(("join", "weight"), [(False, 3), (True, 1)])
def test_of_impure_groups_the_weight_is_best_on_average_over_the_groups(monkeypatch, join, weight):
    """A head that guesses is right on half of every group."""
    train, held_out = _impure(0, 2000), _impure(1)
    accuracies = {1.0: (1.0, 0.4), 3.0: (0.5, 0.5)}

    def judge(share, weight, gate, score, examples, group, sources, l2, num_classes, plan):
        heavy = sources[0].weight
        usual = group % 3 == 0
        place = torch.zeros_like(group)
        for part in (usual, ~usual):
            place[part] = torch.arange(int(part.sum()))
        size = torch.where(usual, usual.sum(), (~usual).sum())
        right = place < torch.where(usual, *(torch.tensor(a) for a in accuracies[heavy])) * size
        worst = min(float(right[group == g].float().mean()) for g in range(4))
        return replace(as_trained(examples, _head(examples)), weight=heavy, share=share, right=right, worst=worst)

    monkeypatch.setattr("demem.removal.rounds._judge", judge)
    rounds = remove_in_rounds(
        train,
        held_out,
        _head(train),
        num_classes=2,
        shares=(0.5,),
        weights=(1, 3),
        typical=torch.tensor([0, 3]),
        join=join,
    )
    assert rounds[-1].share == 0.5
    assert rounds[-1].weight == weight


def test_bad_input_is_refused():
    train, _ = _examples(100, 0.9, 0)
    one_class = Examples(train.features[train.y == 0], train.y[train.y == 0], train.group[train.y == 0])
    with pytest.raises(ValueError, match=r"none of class \[1\]"):
        remove_in_rounds(train, one_class, _head(train), num_classes=2)
    with pytest.raises(ValueError, match="must grow"):
        remove_in_rounds(train, train, _head(train), num_classes=2, shares=(0.5, 0.2))
    broken = train._replace(features=train.features * torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        remove_in_rounds(broken, train, _head(broken), num_classes=2)


def test_the_head_is_refitted_on_held_out_examples_alone():
    train, group = _examples(400, 0.9, 0)
    other, _ = _examples(400, 0.9, 5)
    held_out, held_group = _examples(200, 0.5, 1)
    held_out = held_out._replace(group=held_group)
    heads = [
        remove_in_rounds(examples, held_out, _head(train), num_classes=2, shares=())[1].head
        for examples in (train._replace(group=group), other)
    ]
    assert torch.equal(heads[0].weight, heads[1].weight)
    flipped = held_out._replace(y=1 - held_out.y)
    head = remove_in_rounds(train, flipped, _head(train), num_classes=2, shares=())[1].head
    assert not torch.equal(heads[0].weight, head.weight)


def _hidden_minority(n, seed):
    """Inferred groups of which half of the minority are typical, and features that show who is which."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    minority = torch.rand(n, generator=generator) < 0.06
    inferred = minority | (torch.rand(n, generator=generator) < 0.06)
    shown = torch.stack([2.0 * y - 1, 4.0 * torch.where(minority, 1 - y, y) - 2], 1)
    x = torch.cat([shown, torch.zeros(n, 8)], 1) + torch.randn(n, 10, generator=generator)
    return Examples(x, y, torch.where(inferred, 1, 0) + 2 * y), minority


def test_purer_groups_keep_the_minority_and_lose_hard_examples():
    held_out, minority = _hidden_minority(800, 0)
    train, _ = _hidden_minority(2000, 1)
    typical = torch.tensor([0, 2])
    atypical, purer = (e.atypical(typical) for e in (held_out, purify(held_out, train, typical)))
    assert float(minority[atypical].float().mean()) < 0.6
    assert float(minority[purer].float().mean()) > 0.9
    assert float(purer[minority].float().mean()) > 0.85
    assert not (purer & ~atypical).any()  # no example becomes atypical


def test_purify_leaves_a_class_with_few_atypical_examples_alone():
    held_out, _ = _hidden_minority(120, 0)
    assert 2 < held_out.fewest_atypical(torch.tensor([0, 2])) < 10
    few = held_out.y == int(torch.bincount(held_out.y[held_out.atypical(torch.tensor([0, 2]))]).argmin())
    assert torch.equal(purify(held_out, held_out, torch.tensor([0, 2])).group[few], held_out.group[few])


def test_an_example_does_not_vouch_for_itself():
    """With more features than examples a head fits any group; a head of the other folds tells nothing of noise."""
    generator = torch.Generator().manual_seed(0)
    y = torch.zeros(200, dtype=torch.long)
    group = (torch.arange(200) < 40).long()
    examples = Examples(torch.randn(200, 300, generator=generator), y, group)
    from demem.removal.joint import _log_odds  # its groups say where the threshold is, and not which odds

    odds = _log_odds(examples.features, group == 1, examples.features[:0], group[:0] == 1, 1e-3)
    assert abs(float(odds[:40].mean()) - float(odds[40:].mean())) < float(odds.std())


def _joint(n_held_out, n_train=2000):
    held_out, train = _hidden_minority(n_held_out, 2)[0], _hidden_minority(n_train, 3)[0]
    rounds = [
        remove_in_rounds(train, held_out, _head(train), num_classes=2, shares=(), typical=torch.tensor([0, 2]), join=j)
        for j in (False, True)
    ]
    test, minority = _hidden_minority(4000, 4)
    group = 2 * test.y + minority
    return [worst_group(r[-1].head(test.features), test.y, group)[0] for r in rounds], rounds


@pytest.mark.parametrize("n", [100, 400])  # fewer than ten atypical examples of a class, and more
def test_training_examples_help_where_few_are_held_out(n):
    (alone, joined), (_, rounds) = _joint(n)
    assert joined > alone + 0.02
    assert len(rounds) == 2  # the network as trained, and one refit


def test_training_examples_take_no_part_where_more_are_held_out():
    (alone, joined), rounds = _joint(2000, n_train=400)
    assert alone == joined
    assert [len(r) for r in rounds] == [5, 5]


def test_a_weight_is_not_chosen_that_makes_a_refit_too_dear():
    from demem.removal.rounds import _best_on_average  # which weight it was does not show in a joint head

    y = torch.arange(400) % 2
    atypical = torch.arange(400) < 40  # of which the network gets three quarters right
    held_out, typical = Examples(torch.zeros(400, 40), y, 2 * y + atypical), torch.tensor([0, 2])
    third = torch.arange(400) % 3 == 0
    trained = replace(
        _rounds((0.7, 0.6, 0.6))[0][0], group=held_out.group, right=~(atypical & (torch.arange(400) % 8 < 2))
    )
    cheap, dear = (
        replace(trained, weight=weight, right=torch.where(atypical, gained | trained.right, ~lost))
        for weight, gained, lost in (
            (3.0, torch.arange(400) < 1, torch.arange(400) % 50 == 0),
            (30.0, torch.ones(400, dtype=torch.bool), third & (torch.arange(400) % 2 == 0)),
        )
    )
    assert dear.balanced > cheap.balanced
    assert _best_on_average([cheap, dear], trained, held_out, typical).weight == 3.0
    assert _best_on_average([dear], trained, held_out, typical).weight == 30.0  # there is no other
    misled = replace(trained, right=trained.right & ~atypical)
    assert _best_on_average([cheap, dear], misled, held_out, typical).weight == 30.0


def _fitted(n, seed):
    """Training examples that a network has fitted, and its head, for which new ones are noise there."""
    train, head = _hidden_minority(n, seed)[0], torch.zeros(2, 10)
    train.features[:, 9] = 12.0 * train.y - 6
    head[:, 9] = torch.tensor([-1.0, 1.0])
    return train, LinearHead(head, torch.zeros(2))


def test_a_fitted_example_weighs_as_much_more_as_the_head_misses_less_of_it():
    typical = torch.tensor([0, 2])
    held_out, (train, head) = _hidden_minority(400, 2)[0], _fitted(2000, 3)
    missed = {}
    for name, examples in (("train", train), ("held out", held_out)):
        p = torch.sigmoid(2 * examples.features[:, 9] * (2 * examples.y - 1))  # of the label
        missed[name] = float((1 - p)[examples.group % 2 == 1].mean())
    assert missed["held out"] / missed["train"] > 10
    assert memorization_weight(head, train, held_out, typical) == 10
    assert memorization_weight(head, held_out, train, typical) == 1
    weaker = LinearHead(0.1 * head.weight, head.bias)
    p = [torch.sigmoid(0.2 * e.features[:, 9] * (2 * e.y - 1))[e.group % 2 == 1] for e in (train, held_out)]
    expected = float((1 - p[1]).mean() / (1 - p[0]).mean())
    assert 1 < expected < 10
    assert memorization_weight(weaker, train, held_out, typical) == pytest.approx(expected, rel=1e-4)
    none = held_out._replace(group=2 * held_out.y)
    assert memorization_weight(head, train, none, typical) == 1


def test_a_network_that_has_not_memorised_the_atypical_examples_and_gets_them_right_stays():
    held_out, typical = _hidden_minority(400, 2)[0], torch.tensor([0, 2])
    sees = torch.zeros(2, 10)
    sees[:, 0] = torch.tensor([-2.0, 2.0])  # the class, and new examples as well as those of training
    train, fitted = _fitted(2000, 3)
    chosen = {}
    for name, trained, on in (
        ("sees", LinearHead(sees, torch.zeros(2)), _hidden_minority(2000, 3)[0]),
        ("has fitted", LinearHead(sees + fitted.weight, torch.zeros(2)), train),
        ("is misled", LinearHead(-sees, torch.zeros(2)), _hidden_minority(2000, 3)[0]),
    ):
        rounds = remove_in_rounds(on, held_out, trained, num_classes=2, shares=(), typical=typical, join=True)
        better = replace(rounds[1], right=torch.ones(400, dtype=torch.bool), worst=1.0)
        args = {"typical": typical, "impure": True}
        chosen[name] = choose_round([rounds[0], better], held_out, **args)
        if name == "sees":
            assert rounds[0].memorized < 3
            assert "hardly memorised" in explain_round(0, [rounds[0], better], held_out, **args)
    assert chosen == {"sees": 0, "has fitted": 1, "is misled": 1}


@pytest.mark.parametrize(("n", "alone", "fitted"), [(100, True, False), (400, False, False), (400, False, True)])
def test_the_joint_head_is_fitted_on_held_out_and_training_examples(n, alone, fitted):
    typical, held_out = torch.tensor([0, 2]), _hidden_minority(n, 2)[0]
    train, trained = _fitted(2000, 3) if fitted else (_hidden_minority(2000, 3)[0], _head(held_out))
    purer = purify(held_out, train, typical)
    both = purer.joined(purify(train, purer, typical))
    weights = torch.where(both.atypical(typical), 10.0 if fitted else 1.0, 1.0)
    heads = [fit_balanced(both.features, both.y, both.group, num_classes=2, weights=weights)]
    args = {"num_classes": 2, "shares": (), "typical": typical}
    if not alone:  # the mean of two, in which this one counts twice
        heads.append(heads[0])
        heads.append(max(remove_in_rounds(train, held_out, trained, **args)[1:], key=lambda r: r.worst).head)
    head = remove_in_rounds(train, held_out, trained, **args, join=True)[-1].head
    assert torch.allclose(head.weight, average_heads(heads).weight, atol=1e-5)


def test_without_known_groups_no_class_may_lose():
    """Better on average and in most cells, but one class is a little worse than in the network as trained."""
    y = torch.arange(400) % 2
    examples = Examples(torch.zeros(400, 2), y, 3 * y)
    trained = as_trained(examples, LinearHead(torch.zeros(2, 2), torch.zeros(2)))
    right = torch.ones(400, dtype=torch.bool)
    before = torch.where(y == 0, torch.arange(400) < 200, right)
    after = right.clone()
    after[1] = False  # an example of class 1, which was right
    rounds = [replace(trained, right=before), replace(trained, right=after, worst=0.99)]
    typical = torch.tensor([0, 3])
    assert choose_round(rounds, examples, typical, groups_known=True) == 1
    assert choose_round(rounds, examples, typical, groups_known=False) == 0
    assert choose_round([rounds[0], replace(rounds[1], right=right)], examples, typical, groups_known=False) == 1


def test_a_single_held_out_example_is_enough_beside_training_ones():
    held_out, train = _hidden_minority(400, 2)[0], _hidden_minority(2000, 3)[0]
    for examples in (held_out, train):  # the class is easy to read as well, so that balancing costs no group
        examples.features[:, 0] += 4 * (2 * examples.y - 1)
    typical = torch.tensor([0, 2])
    atypical = held_out.atypical(typical).nonzero()[:, 0]
    kept = torch.zeros(400, dtype=torch.bool)
    kept[[int(atypical[held_out.y[atypical] == c][0]) for c in (0, 1)]] = True  # one of each class
    kept |= ~held_out.atypical(typical)
    one = Examples(*(values[kept] for values in held_out))
    args = {"num_classes": 2, "shares": (), "typical": typical}
    alone, joined = (remove_in_rounds(train, one, _head(train), **args, join=j) for j in (False, True))
    assert alone[-1].fitted_atypical == 1 < 10 < joined[-1].fitted_atypical
    same = torch.ones(len(one.y), dtype=torch.bool)  # neither is clearly better
    chosen = [
        choose_round([replace(r, right=same, memorized=None) for r in rounds], one, typical)
        for rounds in (alone, joined)
    ]
    assert chosen == [0, 1]
