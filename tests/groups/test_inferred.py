import math
from dataclasses import replace

import pytest
import torch

from demem.groups import Groups, Verdict, infer_groups, judge, known_groups, largest_groups, probe_shortcut, second_look


def _groups(error=0.3, shortcut=True, num_classes=2, known=False, epoch=0):
    y = torch.arange(12) % num_classes
    index = num_classes * y + y.roll(1)
    return Groups(index, index[:6], y, y[:6], num_classes, "layer", error, 0.9, shortcut, known, epoch)


@pytest.mark.parametrize("shortcut", [True, False])
def test_of_two_probes_the_second_counts(shortcut):
    after = _groups(0.2, shortcut, epoch=1)
    assert second_look(_groups(0.3), after) is after


@pytest.mark.parametrize(("error", "counts"), [(0.05, 1), (0.15, 1), (0.16, 0), (0.4, 0)])
def test_known_groups_are_transferred_by_a_clearly_better_probe(error, counts):
    before, after = _groups(0.3, known=True), _groups(error, known=True, epoch=1)
    assert second_look(before, after).epoch == counts


@pytest.mark.parametrize(
    ("error", "shortcut", "kind", "known", "expected"),
    [
        (0.2, False, "hard examples", False, True),
        (0.2, False, "nothing", False, True),
        (0.2, True, "shortcut", False, False),
        (0.2, False, "label noise", False, False),
        (0.075, False, "hard examples", False, False),  # 0.15 × chance's error: few mistakes
        (0.075, False, "undecided", False, True),
        (0.2, True, "shortcut", True, True),
        (0.1, True, "shortcut", True, False),
    ],
)
def test_when_the_question_is_open(error, shortcut, kind, known, expected):
    assert replace(_groups(error, shortcut, known=known), kind=kind).open == expected


@pytest.mark.parametrize(("error", "num_classes", "many"), [(0.125, 2, False), (0.13, 2, True), (0.13, 10, False)])
def test_a_probe_with_many_mistakes(error, num_classes, many):
    assert _groups(error, num_classes=num_classes).many_errors == many


def test_known_groups_stay_without_a_shortcut():
    groups = _groups(known=True)
    assert torch.equal(groups.without_shortcut().index, groups.index)
    assert groups.without_shortcut().informative
    assert not _groups().without_shortcut().informative
    assert _groups().informative


def test_an_example_whose_label_looks_wrong_counts_as_typical():
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    index = torch.tensor([0, 1, 1, 1, 3, 3, 2])  # most of class 0 are called 1
    groups = replace(_groups(), y=y, index=index, held_out=torch.tensor([0, 2]), held_out_y=torch.tensor([0, 1]))
    assert groups.typical.tolist() == [1, 3]
    kept = groups.without_wrong_labels(torch.tensor([0.9, 0, 0, 0, 0, 0, 0.5]), torch.tensor([0.5, 0.6]))
    assert kept.index.tolist() == [1, 1, 1, 1, 3, 3, 2]
    assert kept.held_out.tolist() == [0, 3]


def test_suspects_are_what_the_probe_gets_wrong_where_it_follows_no_shortcut():
    x, y = torch.tensor([[0.0], [0.1], [1.0], [0.9]]).repeat(8, 1), torch.tensor([0, 0, 1, 1]).repeat(8)
    y[3] = 0
    for min_sure in (0.0, 1.1):  # whatever the probe is sure of
        groups = infer_groups(probe_shortcut(x, y, 2)._replace(found=min_sure == 0), y, x, y)
        verdict = judge(torch.eye(2)[y], torch.eye(2)[y], y)
        assert groups.judged(replace(verdict, kind="label noise")).suspect.nonzero().tolist() == [[3]]
    found = infer_groups(probe_shortcut(x, y, 2)._replace(found=True), y, x, y)
    assert found.judged(replace(verdict, kind="shortcut")).suspect is None


def test_state_and_repr():
    groups = _groups(known=True, epoch=2)
    state = groups.state_dict()
    assert all(isinstance(value, torch.Tensor | str | int | float | bool | None) for value in state.values())
    again = Groups(**state)
    assert repr(again) == repr(groups)
    assert "known groups" in repr(groups)
    assert "no shortcut" in repr(_groups(shortcut=False))


@pytest.mark.parametrize(
    ("given", "trust"),
    [
        ({"shortcut": False}, (False, False, False)),
        ({"why": "the probe makes few mistakes"}, (True, True, True)),
        ({"why": "a second look sides with the labels (9 mistakes)"}, (True, False, True)),
        ({"known": True}, (True, False, False)),
    ],
)
def test_how_far_groups_are_relied_on(given, trust):
    groups = replace(_groups(), **given)
    assert groups.trust == dict(zip(("groups_known", "doubtful", "impure"), trust, strict=True))


def test_repr_counts_the_atypical_examples():
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    groups = Groups(torch.tensor([0, 0, 1, 3, 3, 2]), torch.tensor([0, 2]), y, y[[0, 3]], 2, "layer", 0.1, 0.9, True)
    assert "atypical: 2 of 6 training and 1 of 2 held-out examples" in repr(groups)


@pytest.mark.parametrize(("epoch", "when"), [(0, "before training:"), (1, "after 1 epoch:"), (2, "after 2 epochs:")])
def test_repr_says_when_the_probe_was_read(epoch, when):
    assert when in repr(replace(_groups(), epoch=epoch))


def test_typical_groups_are_the_largest_of_their_class():
    y = torch.tensor([0, 0, 0, 1, 1, 1, 3])
    index = torch.tensor([0, 0, 1, 2, 3, 3, 6])
    assert largest_groups(y, index, 4).tolist() == [0, 3, -1, 6]
    groups = replace(_groups(), y=y, index=index, num_classes=4)
    assert groups.typical.tolist() == [0, 3, -1, 6]
    assert groups.sizes == [2, 1, 1, 2, 0, 0, 1]


def _examples(n, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    attribute = torch.where(torch.rand(n, generator=generator) < 0.9, y, 1 - y)
    x = 4.0 * attribute[:, None] + torch.randn(n, 3, generator=generator) + 0.2 * y[:, None]
    return x, y, attribute


def test_class_and_probe_are_crossed():
    (x, y, a), (held_x, held_y, held_a) = _examples(400, 0), _examples(100, 1)
    probe = probe_shortcut(x, y, 2, "layer")
    groups = infer_groups(probe, y, held_x, held_y, epoch=3)
    assert float((groups.index == 2 * y + a).float().mean()) > 0.95
    assert float((groups.held_out == 2 * held_y + held_a).float().mean()) > 0.95
    assert (groups.site, groups.epoch, groups.known, groups.shortcut) == ("layer", 3, False, True)
    assert (groups.error, groups.sure) == (probe.error, probe.sure)


@pytest.mark.parametrize("form", ["groups", "attributes"])
def test_known_groups_are_carried_over_to_the_training_examples(form):
    (x, y, a), (held_x, held_y, held_a) = _examples(400, 0), _examples(100, 1)
    given = 2 * held_y + held_a if form == "groups" else held_a
    groups = known_groups(probe_shortcut(x, y, 2), x, y, held_x, held_y, given)
    assert torch.equal(groups.held_out, 2 * held_y + held_a)
    assert float((groups.index == 2 * y + a).float().mean()) > 0.9
    # An example can only be of a group that its class has.
    assert torch.equal(groups.index // 2, y)
    assert groups.known


@pytest.mark.parametrize("kind", ["shortcut", "label noise", "hard examples", "nothing", "undecided"])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("error", [0.05, 0.2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_what_a_verdict_makes_of_the_groups(kind, shortcut, error, epoch):
    groups = _groups(error, shortcut, epoch=epoch)
    verdict = Verdict(kind, 0.9, "the figures", 0.0, 0.0, 0.0, 1.0, 0.0, torch.zeros(12), torch.zeros(12))
    judged = groups.judged(verdict)
    nothing_confident = replace(verdict, surprise=math.nan)
    assert groups.judged(nothing_confident).shortcut == (judged.shortcut and epoch == 0)
    positive = kind == "shortcut" and epoch == 0
    kinds = ("shortcut", "hard examples") if epoch == 0 else ("shortcut", "hard examples", "undecided")
    few = error == 0.05 and kind in kinds
    assert judged.shortcut == (shortcut and (positive or few))
    assert torch.equal(judged.index, groups.index if judged.shortcut else 3 * groups.y)
    assert torch.equal(judged.held_out, groups.held_out if judged.shortcut else 3 * groups.held_out_y)
    few_and_sure = "the probe makes few mistakes and is sure of many; " * (judged.shortcut and kind != "shortcut")
    assert judged.why == few_and_sure + "the figures"
    assert judged.kind == ("shortcut" if judged.shortcut else "hard examples" if kind == "shortcut" else kind)


def test_a_shortcut_that_no_second_look_confirms_is_doubtful():
    y = torch.arange(1000) % 2
    minority = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 0.05
    attribute = torch.where(minority, 1 - y, y)
    early = torch.stack([1 - 2.0 * attribute, 2.0 * attribute - 1], 1) + 0.1 * torch.randn(1000, 2)
    deep = torch.stack([1 - 2.0 * y, 2.0 * y - 1], 1) + 0.1 * torch.randn(1000, 2)
    verdict = judge(early, deep, y)
    assert verdict.kind == "shortcut"
    found = _groups(0.05).judged(verdict)
    assert found.shortcut
    assert not found.doubtful
    assert _groups(0.05).judged(replace(verdict, kind="hard examples", why="they are hard")).doubtful
    assert not _groups(0.05, known=True).doubtful  # nothing is inferred
