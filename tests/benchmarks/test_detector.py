import gzip
import json
import math

import pytest
import torch

from benchmarks import __main__, detector
from benchmarks.experiment import TASKS, Experiment, Settings
from benchmarks.results import read_jsonl
from demem.groups import Groups

MINORITY = torch.tensor([True, True, False, False, False, False])


def test_a_perfect_score_has_average_precision_one_and_a_reversed_one_little():
    score = torch.tensor([0.9, 0.8, 0.3, 0.2, 0.1, 0.0])
    found = detector.measure(MINORITY, None, score)
    assert found == {"chosen": 2, "precision": 1.0, "recall": 1.0, "average_precision": 1.0}
    worst = detector.measure(MINORITY, None, -score)
    assert worst["precision"] == worst["recall"] == 0
    assert worst["average_precision"] == pytest.approx((1 / 5 + 2 / 6) / 2)


def test_set_and_score_are_measured_apart():
    chosen = torch.tensor([True, False, True, True, False, False])
    found = detector.measure(MINORITY, chosen, torch.tensor([3.0, 1.0, 2.0, 0.0, 0.0, 0.0]))
    assert found["chosen"] == 3
    assert found["precision"] == pytest.approx(1 / 3)
    assert found["recall"] == pytest.approx(1 / 2)
    assert found["average_precision"] == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_what_is_undefined_is_none():
    none = torch.zeros(6, dtype=torch.bool)
    assert detector.measure(MINORITY, none, torch.arange(6.0))["precision"] is None
    found = detector.measure(none, MINORITY, torch.arange(6.0))
    assert (found["precision"], found["recall"], found["average_precision"]) == (0.0, None, None)


def test_the_minority_is_what_is_not_the_largest_group_of_its_class_and_balanced_classes_have_none():
    y = torch.tensor([0] * 10 + [1] * 10)
    group = torch.tensor([0] * 9 + [1] + [2] * 5 + [3] * 5)
    assert detector.minority_of(y, group, 2).nonzero()[:, 0].tolist() == [9]


def test_log_odds_rank_as_the_cross_entropy_and_do_not_saturate():
    logits = torch.tensor([[200.0, 0.0, -5.0], [300.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    y = torch.tensor([0, 0, 2])
    odds = detector.log_odds_against(logits, y)
    assert odds[:2].tolist() == pytest.approx([-200.0 + math.log1p(math.exp(-5)), -300.0 + math.log(2)])
    p = logits[2].softmax(0)
    assert float(odds[2]) == pytest.approx(math.log(float((1 - p[2]) / p[2])), abs=1e-5)


@pytest.mark.slow
def test_the_command_finds_the_planted_minority_and_goes_on_where_it_was_cut_off(tmp_path, capsys, monkeypatch):
    arguments = [
        "detector",
        "--data",
        "digits,digits_balanced",
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert __main__.main([*arguments, "--methods", "demem,loss"]) == 0
    assert __main__.main(arguments) == 0
    rows = read_jsonl(tmp_path / "detector.jsonl")
    assert [row["method"] for row in rows if row["data"] == "digits"] == ["demem", "loss", "callback", "jtt", "xrm"]
    demem, loss, second, _, xrm = (row for row in rows if row["data"] == "digits")
    assert demem["kind"] == "shortcut"
    assert min(demem["precision"], demem["recall"], demem["average_precision"]) > 0.95
    assert all(second[key] == demem[key] for key in ("kind", "chosen", "average_precision"))  # nothing was open
    assert loss["chosen"] == loss["minority"]
    assert xrm["tuned_twins"]["rate"] in (0.1, 1.0)
    balanced = next(row for row in rows if row["data"] == "digits_balanced" and row["method"] == "demem")
    assert (balanced["minority"], balanced["average_precision"]) == (0, None)
    assert balanced["kind"] != "shortcut"
    printed = capsys.readouterr().out
    assert "undefined" in printed
    assert balanced["kind"].split()[0] in printed

    def fail(experiment):
        raise AssertionError("a finished row was made again")

    monkeypatch.setattr(detector, "METHODS", dict.fromkeys(detector.METHODS, fail))
    assert __main__.main(arguments) == 0


def test_wrong_names_are_one_line(capsys):
    assert __main__.main(["detector", "--data", "nothing"]) == 2
    assert __main__.main(["detector", "--methods", "afr"]) == 2
    assert "there are demem, callback, loss, jtt, xrm" in capsys.readouterr().err.replace("\n", " ")
    assert __main__.main(["detector", "--data", "dominoes"]) == 2


def test_the_tables_are_made_again_from_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    row = {"data": "digits", "method": "jtt", "seed": 0, "examples": 100, "minority": 5}
    values = [{"precision": None, "recall": 0.25, "average_precision": 0.5}]
    values += [{"precision": 0.5, "recall": 0.75, "average_precision": 0.5}]
    path = tmp_path / "detector.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({**row, **value}) + "\n" for value in values).encode()))
    assert __main__.main(["detector", "--rows", str(path)]) == 0
    printed = capsys.readouterr().out
    for part in ("50.0 (1 of 2)", "50.0 ± 35.4", "50.0 ± 0.0"):
        assert part in printed
    assert __main__.main(["detector", "--rows", str(tmp_path / "none.jsonl")]) == 2


@pytest.mark.parametrize("is_open", [False, True])
def test_the_callback_looks_again_after_an_epoch_where_the_first_look_left_it_open(monkeypatch, is_open):
    if is_open:
        monkeypatch.setattr(Groups, "open", property(lambda groups: groups.epoch == 0))
    chosen, score, told = detector._callback(Experiment(TASKS["digits"], Settings(), 0, "none", 3))
    assert told["epoch"] == int(is_open)
    assert len(chosen) == len(score)
