"""What the papers' experiments conclude from their rows."""

import math

import pytest

from benchmarks.papers.measures import SERIES
from benchmarks.papers.measures_report import MEASURES, epoch_findings, findings, report, tau
from benchmarks.papers.tracing_figures import lost
from benchmarks.papers.tracing_report import interval, write_report
from benchmarks.results import append_jsonl, read_jsonl


def _runs(series, slope):
    """Rows of two seeds in which every measure moves with held-out accuracy by ``slope``."""
    return [
        {"experiment": series.name, "level": level, "seed": seed, "extrinsic": i, **dict.fromkeys(MEASURES, slope * i)}
        for seed in range(2)
        for i, level in enumerate(series.levels)
    ]


@pytest.mark.parametrize(("name", "entropy"), [("circles_artefact", 1.0), ("circles_shuffle", -1.0)])
def test_tau_is_positive_where_a_measure_moves_as_the_paper_says(name, entropy):
    series = next(s for s in SERIES if s.name == name)
    found = {row["measure"]: row for row in findings(series, _runs(series, 0.5))}
    assert found["mean_h"]["kendall_tau"] == pytest.approx(entropy)
    assert found["mean_mi"]["kendall_tau"] == pytest.approx(-entropy)
    assert found["mean_h"]["tau_by_seed"] == pytest.approx([entropy, entropy])
    assert list(findings(series, _runs(series, 0.5)[:-6])) == []  # a level without a run
    assert tau([1.0, 1.0], [1.0, 2.0]) is None


def test_epochs_that_a_measure_picks_are_compared_with_the_last():
    def epoch(value, train, test):
        return {"diversity/entropy": value, "train_group_acc": [1.0, train], "test_group_acc": [0.9, test]}

    run = {"epochs": [epoch(3.0, 0.6, 0.5), epoch(2.0, 0.9, 0.7), epoch(1.0, 1.0, 0.6)]}
    (found,) = epoch_findings([run])
    assert found["kendall_tau"] == pytest.approx(-1.0)  # the gap grows: .1, .2, .4
    assert (found["pick_min_epochs"], found["pick_max_epochs"]) == ([3], [1])
    assert found["pick_max_worst_group_gain"] == pytest.approx(-0.1)


def test_a_report_replaces_its_own_findings_and_keeps_others(tmp_path, capsys):
    for row in _runs(SERIES[0], 1.0):
        append_jsonl(tmp_path / "runs.jsonl", row)
    append_jsonl(tmp_path / "papers.jsonl", {"experiment": SERIES[0].name, "measure": "old"})
    append_jsonl(tmp_path / "papers.jsonl", {"experiment": "other", "measure": "kept"})
    report(tmp_path, SERIES)
    assert [row["measure"] for row in read_jsonl(tmp_path / "papers.jsonl")] == ["kept", *MEASURES]
    assert f"| {SERIES[0].name} | mean_h |" in capsys.readouterr().out


def test_losses_of_minority_and_majority_and_their_interval():
    row = {"minority": [1, 2], "train": {"delta": [0.1, 0.5, 0.3, 0.0]}}
    assert lost(row, "train") == (pytest.approx(40.0), pytest.approx(5.0))
    assert interval([1.0, 2.0, 3.0]) == (pytest.approx(2.0), pytest.approx(4.30 / math.sqrt(3)))
    assert interval([1.0])[1] == math.inf


def test_a_claim_holds_only_beyond_its_interval(tmp_path):
    for seed in range(3):
        for score, minority in (("taylor", 0.4), ("gradient", 0.1 * seed - 0.1), ("random", 0.0)):
            sides = {s: {"before": [1.0] * 4, "delta": [0.0, minority, minority, 0.0]} for s in ("train", "test")}
            row = {"part": "change", "score": score, "share": 0.01, "kind": "zero", "k": 2, "minority": [1, 2]}
            append_jsonl(tmp_path / "tracing.jsonl", {"data": "digits", "seed": seed, **row, **sides})
    write_report(tmp_path)
    text = (tmp_path / "tracing.md").read_text()
    assert "Zeroing the top 1% by taylor costs minority training examples more than majority ones: +40.0 ± 0.0" in text
    verdicts = {line.split(":")[0][2:]: line.split("**")[1] for line in text.splitlines() if "**" in line}
    assert verdicts["Zeroing the top 1% by taylor costs minority training examples more than majority ones"] == "holds"
    name = "Zeroing the top 1% by gradient costs minority training examples more than majority ones"
    assert verdicts[name] == "not decided"
    assert (tmp_path / "tracing_digits.png").stat().st_size > 1000
