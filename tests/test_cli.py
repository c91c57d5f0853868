"""The command line as a user runs it."""

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl

from demem.cli import main

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(path.stem for path in (ROOT / "configs" / "method").glob("*.yaml"))
DATA = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml"))


@pytest.fixture
def demem(tmp_path, monkeypatch):
    """Runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["demem", *map(str, arguments)])
        with warnings.catch_warnings():
            main()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_fit_with_every_method(tmp_path, demem, method):
    demem(
        *("fit", "--config", ROOT / "configs/data/digits.yaml", "--config", ROOT / f"configs/method/{method}.yaml"),
        *("--trainer.max_epochs", 2, "--trainer.default_root_dir", tmp_path, "--trainer.enable_progress_bar", "false"),
    )
    metrics = next(tmp_path.glob("**/metrics.csv"), None)
    if metrics is not None:  # another logger may be installed
        assert "val/worst_group_acc" in metrics.read_text()


@pytest.mark.parametrize("data", DATA)
def test_every_data_config_can_be_read(demem, capsys, data):
    with pytest.raises(SystemExit) as ended:
        demem(
            *("fit", "--config", ROOT / f"configs/data/{data}.yaml"),
            *("--config", ROOT / "configs/method/demem.yaml", "--print_config"),
        )
    assert ended.value.code == 0
    assert "MemorizationRemover" in capsys.readouterr().out


@pytest.mark.slow
def test_a_misspelt_option_is_named(tmp_path):
    arguments = ("fit", "--config", str(ROOT / "configs/data/digits.yaml"), "--data.init_args.correlatoin", "1")
    done = subprocess.run(
        [sys.executable, "-m", "demem.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: data: ")
    assert "correlatoin" in done.stderr
    assert "Traceback" not in done.stderr


DIGITS = ("fit", "--config", "configs/data/digits.yaml")
WRONG = {
    "a config that is not there": (("fit", "--config", "nowhere.yaml"), "nowhere.yaml"),
    "a config that is no YAML": (("fit", "--config", "bad.yaml"), "flow node"),
    "an unknown command": (("fti",), "'fti'; use one of fit,"),
    "no data": (("fit",), "required: fit.data, fit.model"),
    "an unknown class": ((*DIGITS, "--model.class_path", "foo.Bar"), "model: .*No module named 'foo'"),
    "an unknown callback": ((*DIGITS, "--trainer.callbacks+=Foo"), "trainer.callbacks: .*Foo"),
    "an option of no callback": (
        (*DIGITS, "--trainer.callbacks+=MemorizationRemover", "--trainer.callbacks.foo=1"),
        "trainer.callbacks: .*MemorizationRemover.*'foo' is not accepted",
    ),
    "a misspelt option": ((*DIGITS, "--trainer.acelerator", "cpu"), "trainer.acelerator"),
    "an abbreviated option": (
        (*DIGITS, "--trainer.max_epoch", "1"),
        r"--trainer.max_epoch 1. Did you mean --trainer.max_epochs\?",
    ),
    "no such configuration": (("fit", "--config", "digts.yaml"), "These come with demem: .*configs/data/digits.yaml"),
    "no such command": (("ft",), r"one of fit, .* Did you mean fit\?"),
    "a value of another type": ((*DIGITS, "--trainer.max_epochs", "ten"), "trainer.max_epochs: .*ten"),
    "a value that the class refuses": (
        (*DIGITS, "--trainer.callbacks+=MemorizationRemover", "--trainer.callbacks.held_out=3"),
        r"error: held_out is a fraction .* got 3\.0",
    ),
    "no such model": ((*DIGITS, "--model.model", "resnot"), "There is no model 'resnot'"),
    "no data folder": (("fit", "--config", "configs/data/dominoes.yaml"), "data/MNIST/raw"),
    "layers that are not there": (
        (*DIGITS, "--trainer.callbacks+=MemorizationRemover", "--trainer.callbacks.probe_layers=nowhere"),
        "MemorizationRemover: Layer pattern 'nowhere' matches nothing",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", WRONG)
def test_what_goes_wrong_before_training_is_one_line(what, demem, capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    arguments, reason = WRONG[what]
    with pytest.raises(SystemExit) as ended:
        demem(*arguments)
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(reason, last)


def test_a_traceback_is_shown_on_request(demem, monkeypatch):
    monkeypatch.setenv("DEMEM_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="MNIST could not be read"):
        demem("fit", "--config", "configs/data/dominoes.yaml")


def test_what_breaks_in_training_keeps_its_traceback(demem):
    class Breaks(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("out of luck")

    globals()["Breaks"] = Breaks
    with pytest.raises(RuntimeError, match="out of luck"):
        demem(*DIGITS, "--trainer.callbacks+=test_cli.Breaks", "--trainer.enable_progress_bar=false")


def test_version_and_help(demem, capsys):
    demem("--version")
    assert capsys.readouterr().out == f"demem {importlib.import_module('demem').__version__}\n"
    for arguments in ((), ("--help",)):
        demem(*arguments)
        printed = capsys.readouterr().out
        assert all(name in printed for name in ("fit", "report", "--version"))


@pytest.mark.parametrize("arguments", [("-m", "demem"), ("-m", "demem.cli")])
def test_as_a_module(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, *arguments, "--version"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.startswith("demem ")


def test_a_report_is_asked_for_on_the_command_line(demem, capsys):
    config = ("fit", "--config", ROOT / "configs/data/digits.yaml", "--config", ROOT / "configs/method/report.yaml")
    with pytest.raises(SystemExit):
        demem(*config, "--trainer.callbacks.report.class_names", "[low, high]", "--print_config")
    printed = capsys.readouterr().out
    assert "path: report.html" in printed
    assert "- low" in printed
    with pytest.raises(SystemExit):
        demem(
            *config[:3],
            "--trainer.callbacks+=MemorizationRemover",
            "--trainer.callbacks.report=me.html",
            "--print_config",
        )
    assert "report: me.html" in capsys.readouterr().out
