import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from demem.metrics import (
    AccuracyReport,
    AdjustedAverageAccuracy,
    AverageAccuracy,
    GroupAccuracy,
    GroupSizes,
    WorstGroupAccuracy,
    group_accuracy_update,
    worst_group_accuracy,
)
from demem.metrics.functional import MAX_GROUPS


def _reference(preds, target, group, num_groups):
    """Loop over groups in plain Python."""
    accuracies = []
    for g in range(num_groups):
        hits = [int(p) == int(t) for p, t, h in zip(preds, target, group, strict=True) if int(h) == g]
        accuracies.append(sum(hits) / len(hits) if hits else None)
    return accuracies


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_agrees_with_a_loop_whatever_the_batches(rows):
    preds, target, group = (torch.tensor(column) for column in zip(*rows, strict=True))
    expected = _reference(preds, target, group, 4)
    per_group, worst, average = GroupAccuracy(4), WorstGroupAccuracy(4), AverageAccuracy(4)
    for metric in (per_group, worst, average):
        for part in torch.arange(len(rows)).split(7):
            metric.update(preds[part], target[part], group[part])
    got = per_group.compute()
    for g, accuracy in enumerate(expected):
        assert torch.isnan(got[g]) if accuracy is None else float(got[g]) == pytest.approx(accuracy)
    present = [a for a in expected if a is not None]
    assert float(worst.compute()) == pytest.approx(min(present))
    assert torch.equal(worst_group_accuracy(preds, target, group), worst.compute())
    assert float(average.compute()) == pytest.approx(float((preds == target).float().mean()))


def test_worst_group_of_one_set_of_examples():
    logits = torch.tensor([[2.0, 0], [0, 2], [0, 2], [2, 0]])
    target, group = torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 2, 2])  # no example of group 1
    assert float(worst_group_accuracy(logits, target, group)) == 0.5
    assert float(worst_group_accuracy(logits.argmax(1), target, target)) == pytest.approx(2 / 3)  # the worst class
    none = torch.empty(0, dtype=torch.long)
    assert torch.isnan(worst_group_accuracy(none, none, none))


def test_logits_of_several_classes():
    logits = torch.tensor([[0.0, 2, 1], [3, 0, 0], [0, 0, 1]])
    metric = WorstGroupAccuracy(2)
    metric.update(logits, torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]))
    assert float(metric.compute()) == 0.0


def test_adjusted_average_weights_groups_by_training_size_and_skips_empty_ones():
    metric = AdjustedAverageAccuracy([90.0, 10.0, 5.0])
    metric.update(torch.tensor([1, 1, 0, 1]), torch.ones(4, dtype=torch.long), torch.tensor([0, 0, 1, 1]))
    assert float(metric.compute()) == pytest.approx((90 * 1.0 + 10 * 0.5) / 100)


def test_shares_counts_in_a_collection():
    collection = MetricCollection([WorstGroupAccuracy(2), AverageAccuracy(2)])
    collection.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]))
    values = collection.compute()
    assert float(values["WorstGroupAccuracy"]) == 0.0
    assert float(values["AverageAccuracy"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("preds", "target", "group", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), torch.tensor([0, 0]), "target must lie in 0 … 2, got 0 … 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), torch.tensor([0, 0]), "target must lie in 0 … 2, got -1 … 0"),
        (torch.zeros(2), torch.tensor([1, -100]), torch.tensor([0, 0]), "target must lie in 0 … inf, got -100 … 1"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 2]), "group must lie"),
        (torch.full((2, 3), torch.nan), torch.tensor([0, 1]), torch.tensor([0, 1]), "NaN"),
        (torch.zeros(3), torch.tensor([0, 1]), torch.tensor([0, 1]), "preds must be"),
        (torch.tensor([0.9, 0.2]), torch.tensor([0, 1]), torch.tensor([0, 1]), "preds must be class .* fractional"),
        (torch.tensor([[2.0], [-3.0]]), torch.tensor([0, 1]), torch.tensor([0, 1]), "preds must be class .* negative"),
        (torch.tensor([torch.nan, 1]), torch.tensor([0, 1]), torch.tensor([0, 1]), "NaN"),
        (torch.zeros(2), torch.tensor([0.5, 1]), torch.tensor([0, 1]), "target must be class indices .* fractional"),
        (torch.zeros(2), torch.tensor([0, 1]), torch.tensor([0.5, 1]), "group must be indices .* fractional"),
        (torch.zeros(2), torch.tensor([0, 1]), torch.tensor([0]), "same shape"),
    ],
)
def test_bad_input_is_named(preds, target, group, message):
    with pytest.raises(ValueError, match=message):
        group_accuracy_update(preds, target, group, 2)


def _one_of_two(rank):
    metric = WorstGroupAccuracy(3)
    if rank == 0:  # group 0: 1 of 1 here, 0 of 9 there: truth .1, mean of ranks .5; group 2 is empty everywhere
        metric.update(torch.tensor([1, 1]), torch.tensor([1, 1]), torch.tensor([0, 1]))
    else:
        metric.update(torch.zeros(9, dtype=torch.long), torch.ones(9, dtype=torch.long), torch.zeros(9).long())
    return float(metric.compute())


def test_two_processes_give_the_answer_of_one(in_two_processes):
    assert in_two_processes(_one_of_two) == [pytest.approx(0.1)] * 2


def _one_example(group, right=True):
    return torch.tensor([int(right)]), torch.ones(1, dtype=torch.long), torch.tensor([group])


def test_counts_that_grow_with_the_groups_that_come():
    metric, fixed = GroupAccuracy(), GroupAccuracy(4)
    for group, right in ((1, True), (3, False), (0, True), (1, False)):
        for m in (metric, fixed):
            m.update(*_one_example(group, right))
    assert torch.equal(metric.compute().nan_to_num(-1), torch.tensor([1, 0.5, -1, 0]))
    assert torch.equal(metric.compute().nan_to_num(-1), fixed.compute().nan_to_num(-1))
    metric.reset()
    assert metric.total.shape == (0,)


def test_forward_gives_the_batch_and_keeps_the_whole_where_counts_grow():
    metric = GroupSizes()
    assert metric(*_one_example(1)).tolist() == [0, 1]
    assert metric(*_one_example(2)).tolist() == [0, 0, 1]
    assert metric(*_one_example(1)).tolist() == [0, 1]
    assert metric.compute().tolist() == [0, 2, 1]


def test_identifiers_are_not_counted_as_groups():
    with pytest.raises(ValueError, match=r"group must lie in 0 … 1048575, got 0 … 4000000000.*torch\.unique"):
        GroupAccuracy().update(torch.ones(2).long(), torch.ones(2).long(), torch.tensor([0, 4_000_000_000]))
    metric = GroupSizes()
    metric.update(*_one_example(MAX_GROUPS - 1))
    assert len(metric.compute()) == MAX_GROUPS
    with pytest.raises(ValueError, match="group must lie"):
        metric.update(*_one_example(MAX_GROUPS))


def test_weights_that_come_later_and_other_groups_than_theirs():
    metric = AdjustedAverageAccuracy()
    metric.update(torch.tensor([1, 1, 0, 1]), torch.ones(4, dtype=torch.long), torch.tensor([0, 0, 1, 1]))
    assert torch.isnan(metric.compute())
    for weights in ([90, 10], [90, 10, 5]):  # a group of the training set may be missing here
        metric.weights = torch.tensor(weights)
        assert float(metric.compute()) == pytest.approx((90 * 1.0 + 10 * 0.5) / 100)
    metric.weights = torch.tensor([0, 3])
    assert float(metric.compute()) == 0.5
    metric.weights = torch.tensor([0, 0, 7])
    assert torch.isnan(metric.compute())


@pytest.mark.parametrize("preds", [[0.0, 1, 1], [False, True, True], [[0], [1], [1]], [[0.0], [1], [1]]])
def test_forms_of_predicted_classes(preds):
    metric = AverageAccuracy(1)
    metric.update(torch.tensor(preds), torch.tensor([0.0, 1, 0]), torch.zeros(3))
    assert float(metric.compute()) == pytest.approx(2 / 3)


def _processes_that_see_different_groups(rank):
    sizes, accuracy, nothing = GroupSizes(), GroupAccuracy(), GroupSizes()
    for metric in (sizes, accuracy):
        metric.update(*_one_example(2 * rank, right=rank == 1))
    report = AccuracyReport()
    if rank == 1:
        report.update(torch.tensor([1, 0, 1]), torch.tensor([1, 1, 0]), torch.tensor([0, 0, 2]))
    values = {name: float(value) for name, value in report.compute().items()}
    return sizes.compute().tolist(), accuracy.compute().nan_to_num(-1).tolist(), nothing.compute().tolist(), values


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_that_see_different_groups(in_two_processes):
    values = {"worst_group_acc": 0.0, "avg_acc": 1 / 3, "worst_class_acc": 0.0, "group_acc/0": 0.5, "group_acc/2": 0.0}
    for result in in_two_processes(_processes_that_see_different_groups):
        assert result == ([1, 0, 1], [0.0, -1.0, 1.0], [], pytest.approx(values))
