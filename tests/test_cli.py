"""The command line as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(path.stem for path in (ROOT / "configs" / "method").glob("*.yaml"))
DATA = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml"))


def _demem(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "demem.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_fit_with_every_method(tmp_path, method):
    done = _demem(
        *("fit", "--config", ROOT / "configs/data/digits.yaml", "--config", ROOT / f"configs/method/{method}.yaml"),
        *("--trainer.max_epochs", 2, "--trainer.default_root_dir", tmp_path, "--trainer.enable_progress_bar", "false"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = next(tmp_path.glob("**/metrics.csv"), None)
    if metrics is not None:  # another logger may be installed
        assert "val/worst_group_acc" in metrics.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("data", DATA)
def test_every_data_config_can_be_read(tmp_path, data):
    config = ROOT / f"configs/data/{data}.yaml"
    done = _demem(
        *("fit", "--config", config, "--config", ROOT / "configs/method/demem.yaml", "--print_config"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MemorizationRemover" in done.stdout


@pytest.mark.slow
def test_a_misspelt_option_is_named(tmp_path):
    done = _demem(
        "fit", "--config", ROOT / "configs/data/digits.yaml", "--data.init_args.correlatoin", "1", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "correlatoin" in done.stderr
