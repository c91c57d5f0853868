import warnings

import pytest
import torch

from demem.metrics import AccuracyReport, require_groups

PREDS = torch.tensor([0, 0, 1, 1, 1, 0])
Y = torch.tensor([0, 1, 1, 1, 0, 0])
G = torch.tensor([0, 3, 3, 3, 1, 0])  # of 0: 2 of 2, of 1: 0 of 1, of 3: 2 of 3; of the classes: 2 of 3 and 2 of 3


def _floats(values):
    return {name: float(value) for name, value in values.items()}


def test_everything_from_batches_of_any_size():
    report = AccuracyReport()
    for part in torch.arange(6).split(4):
        report.update(PREDS[part], Y[part], G[part])
    expected = {
        "worst_group_acc": 0.0,
        "avg_acc": 4 / 6,
        "worst_class_acc": 2 / 3,
        "group_acc/0": 1.0,
        "group_acc/1": 0.0,
        "group_acc/3": 2 / 3,
    }
    assert _floats(report.compute()) == pytest.approx(expected)
    expected["adjusted_avg_acc"] = (10 * 1.0 + 2 * 2 / 3) / 12
    assert _floats(report.compute(torch.tensor([10, 0, 9, 2, 1]))) == pytest.approx(expected)
    report.reset()
    assert report.compute() == {}
    report.update(PREDS[:1], Y[:1], 2 + G[:1])
    assert _floats(report.compute(torch.tensor([1, 0, 5])))["group_acc/2"] == 1


def test_no_groups():
    report = AccuracyReport()
    report.update(PREDS, Y)
    assert _floats(report.compute(torch.tensor([3, 4]))) == pytest.approx({"avg_acc": 4 / 6, "worst_class_acc": 2 / 3})


def test_a_single_group_is_not_listed_unless_training_knows_others():
    report = AccuracyReport()
    report.update(PREDS, Y, torch.full((6,), 8))
    assert set(report.compute()) == {"worst_group_acc", "avg_acc", "worst_class_acc"}
    assert "group_acc/8" not in report.compute(torch.tensor([0] * 8 + [9]))
    assert "group_acc/8" in report.compute(torch.tensor([4] + [0] * 7 + [9]))


def test_group_zero_alone():
    report = AccuracyReport()
    report.update(PREDS, Y, torch.zeros(6))
    assert set(report.compute()) == {"worst_group_acc", "avg_acc", "worst_class_acc"}
    assert "group_acc/0" in report.compute(torch.tensor([4, 1]))


def test_the_state_can_be_taken_on():
    report, again = AccuracyReport(), AccuracyReport()
    report.update(PREDS[:2], Y[:2], G[:2])
    report.update(PREDS[2:4], Y[2:4], G[2:4])
    state = report.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    again.load_state_dict(state)
    weights = torch.tensor([1, 1, 1, 1])
    assert _floats(again.compute(weights)) == _floats(report.compute(weights))
    for r in (report, again):
        r.update(PREDS[4:], Y[4:], G[4:])
    assert _floats(again.compute(weights)) == _floats(report.compute(weights))


def test_what_this_process_has_counted():
    report = AccuracyReport()
    assert report.group_sizes.tolist() == []
    report.update(PREDS, Y, G)
    report.update(PREDS, Y, G)
    assert report.group_sizes.tolist() == [4, 2, 0, 6]


def test_an_index_is_no_group():
    require_groups(torch.ones(99))
    require_groups(torch.zeros(0))
    require_groups(torch.cat([torch.full((50,), 2), torch.zeros(9)]))  # two of each
    with pytest.raises(ValueError, match="101 examples have 100 groups"):  # as where a sampler fills up a batch
        require_groups(torch.cat([torch.ones(99), torch.tensor([2])]))
    report = AccuracyReport()
    report.update(torch.zeros(100), torch.zeros(100), torch.arange(100).flip(0))
    with pytest.raises(ValueError, match=r"100 examples have 100 groups.*return \(x, y, None\)"):
        report.compute()


def test_an_empty_report_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AccuracyReport().compute() == {}
