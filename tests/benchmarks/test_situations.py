"""The benchmark of situations with and without a shortcut."""

from dataclasses import replace

import pytest
import torch

from benchmarks import __main__, situations
from benchmarks.experiment import Settings
from benchmarks.results import append_jsonl, read_jsonl
from demem.data import GroupedTensors

EMBEDDED = [name for name, situation in situations.SITUATIONS.items() if not situation.files]


@pytest.mark.parametrize("classes", [2, 5])
def test_wrong_labels_are_so_many_and_of_other_classes(classes):
    y = torch.arange(200) % classes
    rows = GroupedTensors(torch.randn(200, 3), y, y)
    wrong = situations.mislabelled(rows, 0.1, classes, seed=0)
    changed = wrong.y != y
    assert int(changed.sum()) == 20
    assert torch.equal(wrong.group, y)  # the true one
    assert set(wrong.y.tolist()) == set(range(classes))
    assert not torch.equal(situations.mislabelled(rows, 0.1, classes, seed=1).y, wrong.y)
    assert torch.equal(situations.mislabelled(rows, 0.0, classes, seed=0).y, y)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_data_are_what_they_are_called(name):
    situation = situations.SITUATIONS[name]
    data = situation.task(name, 10).data(Settings(), seed=0, held_out="iid")
    data.setup()
    train, slice_, test = data.train_dataset, data.val_dataset, data.test_dataset
    groups = data.num_groups // data.num_classes
    for rows, expected in ((train, 0.1), (slice_, 0.1), (test, 0.0)):
        wrong = (rows.y != rows.group // groups).float().mean()
        assert float(wrong) == pytest.approx(expected, abs=0.05)  # also in the slice, which is drawn by the same seed
    network = situation.task(name, 10).module(Settings())
    x, _, _ = next(iter(data.val_dataloader()))
    assert network(x).shape == (len(x), data.num_classes)
    agrees = (train.group % groups == train.y).float().mean() if groups > 1 else 0
    assert (agrees > 0.8) == situation.shortcut


def test_the_sets_do_not_share_examples():
    train, val, test = situations.SITUATIONS["tabular"].make(None, 0)
    rows = torch.cat([part.views[0] for part in (train, val, test)])
    assert len(torch.unique(rows, dim=0)) == len(rows) == 4500


@pytest.fixture
def one(monkeypatch):
    short = replace(situations.SITUATIONS["tabular"], epochs=1)
    monkeypatch.setattr(situations, "SITUATIONS", {"tabular": short, "elsewhere": replace(short, files=("there",))})


def test_command_makes_rows_once_and_prints_them(one, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = ["situations", "--data", "tabular", "--noise", "0,10", "--seeds", "1", "--out", str(tmp_path)]
    assert __main__.main(command) == 0
    rows = read_jsonl(tmp_path / "situations.jsonl")
    assert [(row["data"], row["noise"], row["held_out"], row["seed"]) for row in rows] == [
        ("tabular", 0, "iid", 0),
        ("tabular", 10, "iid", 0),
    ]
    assert all(0.5 < row[f"{arm}_avg"] <= 1 for row in rows for arm in ("erm", "demem"))
    for row in rows:  # left alone, bit for bit
        assert row["erm_avg"] == row["demem_avg"] or row["refit"] or row["probe"]["shortcut"]
    assert rows[0]["probe"]["kind"] in capsys.readouterr().out
    assert __main__.main(command) == 0
    assert read_jsonl(tmp_path / "situations.jsonl") == rows  # nothing is made twice
    assert __main__.main(["situations", "--rows", str(tmp_path / "situations.jsonl")]) == 0


def test_the_verdict_of_all_runs_in_words(tmp_path, capsys):
    row = {"data": "a", "noise": 0, "held_out": "iid", "shortcut": False, "erm_worst_group": 0.9, "erm_avg": 0.95}
    path = tmp_path / "rows.jsonl"
    for seed, (worst, avg, found) in enumerate(((0.9, 0.95, False), (0.87, 0.95, True), (0.9, 0.92, False))):
        probe = {"kind": "shortcut" if found else "nothing", "shortcut": found}
        append_jsonl(path, {**row, "seed": seed, "demem_worst_group": worst, "demem_avg": avg, "probe": probe})
    assert __main__.main(["situations", "--rows", str(path)]) == 0
    assert "Of 3 runs without a shortcut, 1 found one, and 2 lost more than 2 points" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nothing"), "there are tabular, elsewhere"),
        (("--data", "elsewhere"), "pass --data-root"),
        (("--held-out", "test"), "there are none, iid, val"),
        (("--noise", "60"), "percentages from 0 to 50"),
        (("--rows", "nowhere.jsonl"), "no rows"),
    ],
)
def test_bad_options_are_refused(one, options, message, capsys, tmp_path):
    assert __main__.main(["situations", "--out", str(tmp_path), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
