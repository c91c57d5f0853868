"""The command line as a user runs it."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

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
    assert "correlatoin" in done.stderr


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
