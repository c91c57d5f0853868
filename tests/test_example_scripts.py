"""The examples run as they stand."""

import importlib.util
from pathlib import Path


def _load(name):
    path = Path(__file__).resolve().parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_pytorch(capsys):
    before, after = _load("plain_pytorch").main(epochs=12)
    assert after > before + 0.1
    assert "a shortcut" in capsys.readouterr().out
