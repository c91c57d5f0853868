import json
import math

import pytest
from rich.console import Console

from benchmarks.__main__ import main as entry
from benchmarks.compare import main
from benchmarks.report import paired, summarise, write_report
from benchmarks.results import append_jsonl, read_jsonl

FIELDS = ["data", "method", "tier", "held_out", "seed", "worst_group_acc", "group_acc", "avg_acc", "adjusted_avg_acc"]
FIELDS += ["train_group_acc", "selection", "epochs", "seconds", "config"]


def _row(method, seed, worst, tier="T0", **other):
    row = {
        "data": "digits",
        "method": method,
        "tier": tier,
        "held_out": "val",
        "seed": seed,
        "worst_group_acc": worst,
        "group_acc": [0.9, worst, 0.8, 0.9],
        "avg_acc": 0.85,
        "adjusted_avg_acc": 0.9,
        "train_group_acc": [1.0, 1.0, 0.95, 1.0],
        "selection": "last epoch",
        "epochs": 20,
        "seconds": 1.0,
        "config": {},
    }
    return {**row, **other}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "erm,magic"], "unknown method magic. There are: erm, class_balanced"),
        (["--data", "digit"], "unknown data set digit. There are: digits"),
        (["--data", "waterbirds"], "pass --data-root"),
        (["--data", "dominoes", "--data-root", "/nowhere"], "reads MNIST/raw below --data-root, and /nowhere has none"),
        (["--seeds", "few"], "--seeds takes a number or a list"),
        (["--seeds", "0"], "--seeds takes a number from 1 up"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--held-out", "iid", "--methods", "afr"], "None of afr uses --held-out iid"),
    ],
)
def test_bad_arguments_end_before_training(tmp_path, capsys, arguments, message):
    assert entry(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_unwritable_out(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert entry(["compare", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in " ".join(capsys.readouterr().err.split())


def test_commands_are_listed_and_unknown_ones_refused(capsys):
    assert entry(["--help"]) == 0
    assert "compare" in capsys.readouterr().out
    assert entry(["magic"]) == 2
    assert "Unknown benchmark: magic" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ceiling", "speed remover"])
def test_a_missing_folder_is_named(tmp_path, capsys, command):
    assert entry([*command.split(), "--data", "dominoes", "--out", str(tmp_path)]) == 2
    assert "pass --data-root" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_rows_table_figures_and_resume(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--methods", "erm,cb_llr", "--seeds", "2", "--epochs", "1", "--out", str(out)]
    assert main(arguments) == 0
    rows = read_jsonl(out / "results.jsonl")
    assert [(row["seed"], row["method"]) for row in rows] == [(0, "erm"), (0, "cb_llr"), (1, "erm"), (1, "cb_llr")]
    for row in rows:
        assert list(row) == FIELDS
        assert len(row["group_acc"]) == len(row["train_group_acc"]) == 4
        assert row["worst_group_acc"] == min(row["group_acc"])
        assert 0 <= row["worst_group_acc"] <= row["adjusted_avg_acc"] <= 1
    assert {"table.md", "worst_group.png", "worst_against_average.png", "diversity.png"} <= {
        p.name for p in out.iterdir()
    }
    printed = capsys.readouterr().out
    assert "cb_llr" in printed
    assert "Next:" in printed

    # Killed half-way: the last line is cut. Resuming trains what is missing, and only that.
    lines = (out / "results.jsonl").read_text().splitlines()
    (out / "results.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    assert main([*arguments, "--resume"]) == 0
    again = read_jsonl(out / "results.jsonl")
    assert again[:3] == rows[:3]
    assert len(again) == 4
    different = [k for k in FIELDS if again[3][k] != rows[3][k]]
    assert set(different) <= {"seconds"}  # the same seed gives the same row, whatever ran before it

    # Without --resume earlier rows are put aside, not mixed in.
    assert main(["--methods", "erm", "--seeds", "1", "--epochs", "1", "--out", str(out)]) == 0
    assert len(read_jsonl(out / "results.jsonl")) == 1
    assert len(list(out.glob("results-*.jsonl"))) == 1


def test_table_pairs_each_arm_with_erm_on_the_same_seeds(tmp_path):
    rows = [_row("erm", s, 0.5 + 0.01 * s) for s in range(3)]
    rows += [_row("demem", s, 0.8 + 0.01 * s + 0.001 * (s == 1)) for s in range(4)]
    difference, half, p = paired(rows[3:], rows[:3])
    assert difference == pytest.approx(0.3 + 0.001 / 3)
    assert 0 < half < 0.01
    assert p < 1e-4
    lines = summarise(rows)
    assert lines[0][:4] == ["erm", "T0", "val", "51.0 ± 1.0"]
    assert lines[1][0] == "demem"
    assert lines[1][4].startswith("+30.0")
    assert math.isnan(paired(rows[3:4], rows[:1])[1])
    for row in rows:
        append_jsonl(tmp_path / "results.jsonl", row)
    write_report(tmp_path, Console(width=80, quiet=True))
    table = (tmp_path / "table.md").read_text()
    assert "| demem | T0 | val |" in table
    assert (tmp_path / "memorization_gap.png").stat().st_size > 1000


def test_figures_from_recorded_units_rounds_and_diversity(tmp_path):
    append_jsonl(tmp_path / "results.jsonl", _row("erm", 0, 0.5))
    for i in range(10):
        identity = {"data": "digits", "method": "demem", "tier": "T0", "held_out": "val", "seed": 0}
        impacts = {"typical": i, "atypical": -i, "typical_after": i, "atypical_after": i}
        append_jsonl(tmp_path / "units.jsonl", {**identity, "unit": i, **impacts, "gated": i > 5})
        noted = {"refit": i > 0, "share": i / 10, "worst": 0.5, "test_worst": 0.4, "chosen": i == 3}
        append_jsonl(tmp_path / "rounds.jsonl", {**identity, **noted})
        append_jsonl(tmp_path / "diversity.jsonl", {**identity, "epoch": i, "entropy": 2.0, "mutual_information": None})
    write_report(tmp_path)
    assert {"unit_map.png", "rounds.png", "diversity.png"} <= {p.name for p in tmp_path.iterdir()}
    assert json.loads((tmp_path / "results.jsonl").read_text())["method"] == "erm"
