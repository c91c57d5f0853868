"""The examples run as they stand, on small data."""

import importlib.util
import json
import re
import sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def _load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", [*SCRIPTS, *NOTEBOOKS], ids=lambda path: path.stem)
def test_scripts_are_short_and_listed(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_every_script_is_run():
    here = Path(__file__).read_text(encoding="utf-8")
    elsewhere = {"own_comparison"}  # tests/benchmarks/test_own.py
    assert {path.stem for path in SCRIPTS} - elsewhere == _names(here)


def _names(source):
    return set(re.findall(r"_load\(\"(\w+)\"\)", source))


def test_plain_pytorch(capsys):
    before, after = _load("plain_pytorch").main(epochs=12)
    assert after > before + 0.1
    assert "a shortcut" in capsys.readouterr().out


@pytest.mark.slow
def test_audit(capsys):
    found = _load("audit").main()
    assert [detection.groups.kind for detection in found] == ["shortcut", "hard examples", "label noise"]
    assert [detection.groups.shortcut for detection in found] == [True, False, False]
    assert int(found[0].minority.sum()) == 50  # 5% of the training digits
    printed = capsys.readouterr().out
    assert "against the shortcut" in printed
    assert "label noise" in printed


def _run_notebook(name):
    """The names that its cells leave, and the value of the last line, which a notebook shows."""
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    *code, last = [line for c in cells if c["cell_type"] == "code" for line in "".join(c["source"]).splitlines()]
    names = {}
    exec("\n".join(code), names)
    return names, eval(last, names)


def test_notebooks_are_kept_without_outputs():
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert notebook["nbformat"] == 4
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])


@pytest.mark.slow
def test_own_module_in_a_notebook(tmp_path, monkeypatch):
    main = _load("own_module").main

    def short(folder):
        made = main(epochs=6, folder=str(tmp_path))
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace())  # not installed without a notebook, and
        monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str))  # matplotlib looks for it
        return made

    monkeypatch.setitem(sys.modules, "own_module", SimpleNamespace(main=short))
    names, shown = _run_notebook("report")
    remover, monitor = names["remover"], names["monitor"]
    inner = re.search(r'<iframe srcdoc="([^"]*)"', shown)[1]
    assert unescape(inner) == remover.reporter.path.read_text(encoding="utf-8")
    assert remover.groups.shortcut
    assert "worst_group_acc" in monitor.history[-1]  # the batches' own form was read, groups and all
    assert remover.reporter.path.is_file()


@pytest.mark.slow
def test_tabular(tmp_path):
    before, after, remover = _load("tabular").main(folder=str(tmp_path))
    assert after > before + 0.3
    assert "income" in remover.reporter.path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_text(tmp_path):
    pytest.importorskip("transformers")
    remover = _load("text_huggingface").main(epochs=2, tiny=True, folder=str(tmp_path))
    assert remover.groups.shortcut
    assert "london" in remover.reporter.path.read_text(encoding="utf-8")  # sentences, not token ids


def test_waterbirds_without_the_folder(tmp_path):
    with pytest.raises(SystemExit, match=r"waterbirds_v1\.0.*\n.*download=True"):
        _load("waterbirds_timm").main([str(tmp_path)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_waterbirds_on_made_images(tmp_path):
    made_waterbirds(tmp_path)
    options = ("--random-weights", "--epochs", "1", "--crop", "32", "--model", "resnet10t", "--out", str(tmp_path))
    remover = _load("waterbirds_timm").main([str(tmp_path), *options])
    assert remover.rounds
    assert len(remover.groups.index) == 300
    assert "landbird" in remover.reporter.path.read_text(encoding="utf-8")


def made_waterbirds(root, sizes=(300, 80, 80)):
    """A folder in the layout of Waterbirds: a small bird before green or blue."""
    import pandas as pd
    from PIL import Image

    folder, rows = root / "waterbirds_v1.0", []
    folder.mkdir()
    draw = np.random.default_rng(0)
    for split, size in enumerate(sizes):
        for i in range(size):
            y = i % 2
            place = y if split == 0 and draw.random() < 0.95 else int(draw.integers(2)) if split else 1 - y
            image = draw.integers(0, 60, (40, 40, 3))
            image[..., 2 if place else 1] += 150  # water is blue, land is green
            at = draw.integers(4, 24)
            image[at : at + 10 : 1 + y, at : at + 10] = 0  # stripes are waterbirds
            name = f"{split}_{i}.png"
            Image.fromarray(image.astype(np.uint8)).save(folder / name)
            rows.append({"img_filename": name, "y": y, "split": split, "place": place})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv")
    (folder / "RELEASE_v1.0.txt").touch()
    return root
