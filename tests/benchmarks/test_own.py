"""Data sets and arms of one's own."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main as entry
from benchmarks.compare import main
from benchmarks.experiment import TASKS, Experiment, Settings
from benchmarks.results import read_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = """
from benchmarks.baselines.erm import METHODS as ERM
from benchmarks.experiment import TASKS, Method

def a_list(): return []
def needs_more(settings): ...
def digits_again(): return TASKS["digits"]
def fails(): raise ValueError("no data today")
NAMES = ["erm"]
EMPTY = []
MINE = [Method("mine", "T0", "a rule", print, ("none",)), Method("mine", "T0", "a rule", print)]
TWICE = [*MINE, Method("mine", "T0", "a rule", print, ("val",))]
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module ``mine``, and one that imports what is not there."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--data", "no_such_module:make", "there is no module 'no_such_module'. Run from the folder that holds it"),
        ("--data", "mine.part:make", "there is no module 'mine.part'"),
        ("--data", ":make", "there is no module ''"),
        ("--data", "broken:make", "broken imports 'not_installed_anywhere', which is not installed."),
        ("--data", "mine:nothing", "the module 'mine' has no 'nothing'"),
        ("--data", "mine:a_list", "that returns a benchmarks.experiment.Task, got list"),
        ("--data", "mine:needs_more", "must be a function without arguments that returns"),
        ("--data", "mine:digits_again", "there is a data set 'digits' already. Give yours another name."),
        ("--data", "mine:fails", "no data today"),
        ("--data", "digits,magic", "unknown data set magic"),
        ("--methods", "mine:nothing", "the module 'mine' has no 'nothing'"),
        ("--methods", "mine:NAMES", "must be a list of benchmarks.experiment.Method, got 'a list with str'"),
        ("--methods", "mine:EMPTY", "must be a list of benchmarks.experiment.Method, got []"),
        ("--methods", "mine:a_list", "must be a list of benchmarks.experiment.Method, got <function"),
        ("--methods", "mine:ERM", "there is an arm 'erm' already. Give yours another name."),
        ("--methods", "mine:TWICE", "there is an arm 'mine' already. Give yours another name."),
        ("--methods", "mine:MINE,mine:TWICE", "there is an arm 'mine' already. Give yours another name."),
    ],
)
def test_errors_are_one_line_that_names_the_option(mine, capsys, option, name, message):
    assert entry(["compare", option, name, "--out", str(mine / "out")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error: ")
    assert message in error
    assert not (mine / "out").exists()


def test_an_arm_of_ones_own_runs_beside_the_known_ones(mine):
    from benchmarks.compare import _parser, make_plan

    plan = make_plan(_parser().parse_args(["--methods", "mine:MINE,erm", "--held-out", "all", "--seeds", "1"]))
    assert [(job.held_out, job.method.name) for job in plan.jobs()] == [
        ("none", "erm"),
        ("none", "mine"),
        ("iid", "erm"),
        ("iid", "mine"),
        ("val", "erm"),
        ("val", "mine"),
    ]


def test_data_and_networks_of_another_kind_are_named():
    task = replace(TASKS["digits"], data=lambda settings, **options: [])
    with pytest.raises(ValueError, match=r"The data of digits must be a demem.data.GroupedDataModule, got list"):
        Experiment(task, Settings(), 0).data()
    task = replace(TASKS["digits"], module=lambda settings, **options: {})
    with pytest.raises(ValueError, match=r"The network of digits must be a demem.module.Classifier, got dict"):
        Experiment(task, Settings(), 0).module()


def test_the_example_is_short_and_in_the_readme():
    example = (REPOSITORY / "examples" / "own_comparison.py").read_text()
    assert len(example.splitlines()) <= 30
    assert example in (REPOSITORY / "README.md").read_text()


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    name = "examples.own_comparison"
    arguments = ["--data", f"{name}:make_task", "--methods", f"erm,dfr,{name}:METHODS", "--held-out", "none,iid"]
    assert main([*arguments, "--seeds", "1", "--out", str(tmp_path)]) == 0
    rows = {(row["held_out"], row["method"]): row for row in read_jsonl(tmp_path / "results.jsonl")}
    assert set(rows) == {(s, m) for s in ("none", "iid") for m in ("erm", "strong_decay", "dfr")} - {("none", "dfr")}
    # The shortcut is there to be seen: plain training follows it, true groups on held-out data cure it.
    assert rows["none", "erm"]["worst_group_acc"] < 0.4 < 0.6 < rows["iid", "dfr"]["worst_group_acc"]
    assert rows["none", "strong_decay"]["worst_group_acc"] < 0.4
