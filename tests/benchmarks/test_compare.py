import gzip
import json
import math

import pytest
import torch
from rich.console import Console

from benchmarks.__main__ import main as entry
from benchmarks.compare import Plan, _alone, _choices, _drop_extras_without_a_row, _parser, main, make_plan, run_job
from benchmarks.experiment import HELD_OUT, TASKS, Experiment, Method, Outcome, Settings, Shared
from benchmarks.report import summarise, write_report
from benchmarks.results import append_jsonl, read_jsonl
from benchmarks.rows import paired

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
        (["--held-out", "none", "--methods", "dfr,afr"], "None of dfr, afr uses --held-out none"),
        (["--held-out", "test"], "--held-out: unknown held-out source test. There are: none, iid, val."),
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
def test_a_folder_in_use_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with _alone(out):
        assert entry(["compare", "--methods", "erm", "--seeds", "1", "--epochs", "1", "--out", str(out)]) == 2
    assert "is in use" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()  # nothing was written, and it was let go of


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
    assert lines[0][:3] == ["erm", "T0", "51.0 ± 1.0"]
    assert lines[1][0] == "demem"
    assert lines[1][3].startswith("+30.0")
    assert math.isnan(paired(rows[3:4], rows[:1])[1])
    for row in rows:
        append_jsonl(tmp_path / "results.jsonl", row)
    write_report(tmp_path, Console(width=80, quiet=True))
    table = (tmp_path / "table.md").read_text()
    assert "## digits, held out: val" in table
    assert "| demem | T0 |" in table
    assert (tmp_path / "memorization_gap.png").stat().st_size > 1000


def test_figures_from_recorded_units_rounds_and_diversity(tmp_path):
    append_jsonl(tmp_path / "results.jsonl", _row("erm", 0, 0.5))
    for i in range(10):
        identity = {"data": "digits", "method": "demem", "tier": "T0", "held_out": "val", "seed": 0}
        impacts = {"typical": i, "atypical": -i, "typical_after": i, "atypical_after": i}
        append_jsonl(tmp_path / "units.jsonl", {**identity, "unit": i, **impacts, "gated": i > 5})
        noted = {"refitted": i > 0, "share": i / 10, "worst": 0.5, "test_worst": 0.4, "chosen": i == 3}
        append_jsonl(tmp_path / "rounds.jsonl", {**identity, **noted})
        append_jsonl(tmp_path / "diversity.jsonl", {**identity, "epoch": i, "entropy": 2.0, "mutual_information": None})
    write_report(tmp_path)
    assert {"unit_map.png", "rounds.png", "diversity.png"} <= {p.name for p in tmp_path.iterdir()}
    assert json.loads((tmp_path / "results.jsonl").read_text())["method"] == "erm"


def test_held_out_sources_are_a_list_or_a_name_for_several():
    def sources(given):
        return make_plan(_parser().parse_args(["--held-out", given])).held_out

    assert sources("val") == ["val"]
    assert sources("none,val,none") == ["none", "val"]
    assert sources("both") == ["val", "iid"]
    assert sources("all") == ["none", "iid", "val"]


def test_an_arm_has_rows_only_where_it_can_run():
    options = _parser().parse_args(["--methods", "erm,jtt,dfr,afr", "--held-out", "all", "--seeds", "1"])
    rows = {(job.held_out, job.method.label) for job in make_plan(options).jobs()}
    assert {label for source, label in rows if source == "none"} == {"erm T0", "jtt T0"}
    assert {label for source, label in rows if source == "iid"} == {"erm T0", "jtt T1", "dfr T2"}
    assert {label for source, label in rows if source == "val"} == {"erm T0", "jtt T1", "dfr T2", "afr T1"}


def test_with_none_the_whole_training_set_is_trained_on():
    whole, none, iid = (
        Experiment(TASKS["digits"], Settings(), 0, held_out).data() for held_out in ("val", "none", "iid")
    )
    assert none.train_dataset.positions.equal(whole.train_dataset.positions)
    assert none.val_dataset.y.equal(whole.val_dataset.y)
    assert len(iid.train_dataset) < len(none.train_dataset)
    with pytest.raises(ValueError, match="held_out must be one of none, iid, val, got 'test'"):
        Experiment(TASKS["digits"], Settings(), 0, "test")


def test_an_arm_that_trains_on_no_held_out_label_runs_once_for_none_and_val():
    calls = []

    def run(experiment):
        calls.append((experiment.seed, experiment.held_out))
        data = experiment.data()
        sets = {"train": data.train_eval_dataset, "test": data.test_dataset}
        return Outcome({split: torch.nn.functional.one_hot(rows.y, 2).float() for split, rows in sets.items()})

    everywhere, refit = Method("mine", "T0", "a rule", run, HELD_OUT), Method("refit", "T0", "a rule", run)
    plan, shared = Plan([TASKS["digits"]], [everywhere, refit], [0, 1], list(HELD_OUT)), Shared()
    rows = []
    for job in plan.jobs():
        if (job.seed, job.held_out, job.method.name) == (1, "none", "mine"):
            shared.start_seed()
        rows.append(run_job(job, plan, Settings(), shared)[0])
    assert calls == [(0, "none"), (0, "iid"), (0, "iid"), (0, "val"), (1, "none"), (1, "iid"), (1, "iid"), (1, "val")]
    assert [row["held_out"] for row in rows if row["method"] == "mine" and row["seed"] == 0] == list(HELD_OUT)
    same = [{k: v for k, v in row.items() if k != "held_out"} for row in rows if row["method"] == "mine"]
    assert same[0] == same[2]
    assert not plan.missing([{**row, "epochs": 20} for row in rows])
    assert [str(job) for job in plan.missing(rows[1:])] == ["digits · seed 0 · none · mine T0"]


def test_arms_that_share_a_name_on_different_sources_are_not_mixed_up():
    def arm(name, share, *held_out):
        def run(experiment):
            data = experiment.data()
            sets = {"train": data.train_eval_dataset, "test": data.test_dataset}
            return Outcome({split: torch.zeros(len(rows.y), 2) for split, rows in sets.items()}, {"share": share})

        return Method(name, "T0", "a rule", run, held_out)

    methods = [arm("ours", 0.1, "none"), arm("ours", 0.2, "val")]
    plan, shared = Plan([TASKS["digits"]], methods, [0], ["none", "val"]), Shared()
    rows = [run_job(job, plan, Settings(), shared)[0] for job in plan.jobs()]
    assert [(row["held_out"], row["config"]["share"]) for row in rows] == [("none", 0.1), ("val", 0.2)]


def test_choices_hold_for_later_seeds_and_are_shared_by_none_and_val():
    shared = Shared()
    first, later, iid = (
        Experiment(TASKS["digits"], Settings(), seed, held_out, shared=shared)
        for seed, held_out in ((0, "none"), (1, "val"), (0, "iid"))
    )
    assert first.choose("arm", lambda: {"lr": 1}) == {"lr": 1}
    shared.runs[first.erm_key] = None  # a network of the first seed
    shared.start_seed()
    assert not shared.runs  # networks are large
    assert later.choose("arm", lambda: {"lr": 2}) == {"lr": 1}
    assert iid.choose("arm", lambda: {"lr": 3}) == {"lr": 3}


def test_choices_hold_after_a_resume():
    rows = [
        _row("xrm_dro", 0, 0.5, held_out="none", config={"tuned": {"lr": 1}, "tuned_twins": {"rate": 2}, "epoch": 3})
    ]
    rows += [_row("xrm_dro", 1, 0.5, config={"tuned": {"lr": 4}}), _row("erm", 0, 0.5)]
    assert _choices(rows) == {
        ("digits", "xrm_dro", "val"): {"lr": 1},
        ("digits", "xrm_dro_twins", "val"): {"rate": 2},
    }


def test_an_arm_that_hands_back_something_else_is_named():
    plan = Plan([TASKS["digits"]], [Method("mine", "T0", "a rule", lambda experiment: None)], [0], ["val"])
    with pytest.raises(ValueError, match=r"The arm mine T0 must return a benchmarks.experiment.Outcome"):
        run_job(next(plan.jobs()), plan, Settings(), Shared())


def test_held_out_sources_are_never_in_one_ranking(tmp_path):
    rows = [_row("erm", 0, 0.5, held_out=source) for source in ("val", "none", "iid")]
    rows += [_row("dfr", 0, 0.9, tier="T2"), _row("demem", 0, 0.7, held_out="none"), _row("demem", 0, 0.8)]
    rows += [_row("erm", 0, 0.3, data="other")]
    for row in rows:
        append_jsonl(tmp_path / "results.jsonl", row)
    write_report(tmp_path)
    parts = (tmp_path / "table.md").read_text().split("## ")[1:]
    assert [part.splitlines()[0] for part in parts] == [
        "digits, held out: none",
        "digits, held out: iid",
        "digits, held out: val",
        "other, held out: val",
    ]
    arms = [[line.split(" | ")[0] for line in part.splitlines() if " | T" in line] for part in parts]
    assert arms == [["| erm", "| demem"], ["| erm"], ["| erm", "| demem", "| dfr"], ["| erm"]]


def test_a_narrow_terminal_cuts_names_and_no_numbers(tmp_path):
    for seed in range(2):
        append_jsonl(tmp_path / "results.jsonl", _row("erm", seed, 0.5))
        append_jsonl(
            tmp_path / "results.jsonl", _row("a_method_with_a_name_of_a_great_many_letters", seed, 0.123 + seed / 9)
        )
    console = Console(width=80, record=True)
    write_report(tmp_path, console)
    (line,) = [line for line in console.export_text().splitlines() if "a_method" in line]
    assert "…" in line
    assert " 17.9 ± 7.9 " in line
    assert len(line.rstrip()) > 70  # and no room is left unused
    assert line.rstrip().endswith("90.0 ± 0.0")


def test_tables_are_made_again_from_rows_on_disk(tmp_path, capsys):
    for seed in range(2):
        append_jsonl(tmp_path / "results.jsonl", _row("erm", seed, 0.5))
        diversity = {"epoch": 1, "entropy": 2.0, "mutual_information": None}
        append_jsonl(tmp_path / "diversity.jsonl", {**_row("erm", seed, 0.5), **diversity})
    for name in ("results", "diversity"):
        content = (tmp_path / f"{name}.jsonl").read_bytes()
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("results.jsonl", "results.jsonl.gz"):
        out = tmp_path / f"of {name}"
        assert entry(["table", str(tmp_path / name), "--out", str(out)]) == 0
        assert "50.0 ± 0.0" in capsys.readouterr().out
        assert {"table.md", "index.html", "worst_group.png", "diversity.png"} <= {path.name for path in out.iterdir()}
        (tmp_path / "diversity.jsonl").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no file"),
        (b"", "holds no rows"),
        (b'{"part": "done"}\n', "Row 1 of"),
        (b'{"part": "done"}\n', "has no data, epochs, group_acc"),
        (json.dumps(_row("erm", 0, 0.5, held_out="test")).encode(), "has the held-out source 'test'"),
    ],
)
def test_a_table_of_other_files_is_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    assert entry(["table", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_extras_of_a_row_that_was_not_written_are_dropped(tmp_path):
    """A comparison that was killed between a row's extras and the row makes both again."""
    done = {"data": "digits", "method": "erm", "tier": "T0", "held_out": "val", "seed": 0}
    for identity in (done, done | {"seed": 1}):
        append_jsonl(tmp_path / "units.jsonl", {**identity, "unit": 3})
    _drop_extras_without_a_row(tmp_path, [done | {"worst_group_acc": 0.5}])
    assert read_jsonl(tmp_path / "units.jsonl") == [{**done, "unit": 3}]
    assert [path.name for path in tmp_path.iterdir()] == ["units.jsonl"]


@pytest.mark.parametrize("option", ["--sedds", "--held", "--seed"])
def test_a_misspelt_or_abbreviated_option_is_named_and_the_right_one_too(option, capsys):
    with pytest.raises(SystemExit) as ended:
        entry(["compare", option, "1"])
    assert ended.value.code == 2
    meant = "--held-out" if option == "--held" else "--seeds"
    assert f"unrecognized arguments: {option} 1. Did you mean {meant}?" in " ".join(capsys.readouterr().err.split())
