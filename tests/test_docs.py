"""The documentation is true: its Python blocks run, and its commands can be parsed."""

import argparse
import importlib
import inspect
import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest
from test_example_scripts import made_waterbirds

from demem import tracing

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SLOW = "<!-- slow -->"


def _blocks(page, language):
    """(line, text) of each block."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match[1] == language:
            yield text[: match.start(2)].count("\n"), match[2]


def _pages():
    for page in PAGES:
        if any(_blocks(page, "python")):
            slow = page.read_text(encoding="utf-8").startswith(SLOW)
            yield pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("page", list(_pages()))
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    made_waterbirds(tmp_path / "data", sizes=(40, 12, 12))
    names = {"__name__": "__main__"}
    monkeypatch.setattr(tracing.scores, "SCORES", scores := dict(tracing.SCORES))  # a page adds one
    monkeypatch.setattr(tracing, "SCORES", scores)
    for line, text in _blocks(page, "python"):
        if "import transformers" in text:
            pytest.importorskip("transformers")
        # Empty lines before it, so that a traceback names the line of the page.
        exec(compile("\n" * line + text, str(page), "exec"), names)


def _commands():
    for page in PAGES:
        for _, text in _blocks(page, "bash"):
            for line in text.replace("\\\n", " ").splitlines():
                for command in line.split(" && "):
                    yield pytest.param(shlex.split(command), id=f"{page.stem}: {command}")
    for command in re.findall(r"`(python [^`]+)`", (ROOT / "examples" / "README.md").read_text(encoding="utf-8")):
        yield pytest.param(shlex.split(command), id=f"examples: {command}")


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("command", list(_commands()))
def test_commands_are_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if command[:2] == ["demem", "report"] or command[:3] == ["python", "-m", "benchmarks"]:
        parse = argparse.ArgumentParser.parse_args

        def parse_only(self, *args, **kwargs):
            parse(self, *args, **kwargs)
            raise _Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        module, own = ("demem.cli", 1) if command[0] == "demem" else ("benchmarks.__main__", 3)
        with pytest.raises(_Parsed):
            importlib.import_module(module).main(command[own:])
    elif command[0] == "demem":
        monkeypatch.setattr(sys, "argv", [*command, "--print_config"])
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            importlib.import_module("demem.cli").main()
        assert ended.value.code == 0
    elif command[0] == "python":
        assert (ROOT / command[1]).is_file()
    else:
        assert command[0] in ("pip", "ruff", "mypy", "pytest", "mkdocs"), f"unknown command {command[0]}"


ROOMS = sorted(page.stem for page in (ROOT / "docs" / "api").glob("*.md"))


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_function_has_its_place_in_the_reference(room):
    page = (ROOT / "docs" / "api" / f"{room}.md").read_text(encoding="utf-8")
    module = importlib.import_module(f"demem.{room}")
    assert f"::: demem.{room}\n" in page
    for name in getattr(module, "__all__", ()):
        file = sys.modules.get(f"demem.{room}.{name}")  # a function that is called like its file is hidden by it
        if inspect.ismodule(file) and not inspect.ismodule(getattr(module, name)):
            assert f"::: demem.{room}.{name}.{name}\n" in page


def test_every_room_is_in_the_reference():
    folder = ROOT / "src" / "demem"
    rooms = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__", "__main__"} == set(ROOMS)
