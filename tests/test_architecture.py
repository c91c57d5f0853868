"""The rooms of the house: what each may import, and from where."""

import ast
from pathlib import Path

import pytest

import demem

ROOT = Path(demem.__file__).parent
# From the ground up; a file imports from its own floor or from one below.
FLOORS = (
    *("batch", "sites", "logistic", "linear", "metrics", "measures", "tracing", "groups", "removal", "report"),
    *("data", "run", "module", "callbacks", "cli", "__init__", "__main__"),
)
PLAIN_TORCH = FLOORS[: FLOORS.index("data")]


def _room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path):
    """(line, module, name) of everything that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split("."), ""
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, (node.module or "").split("."), alias.name


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_through_doors_and_never_upwards(path):
    own = _room(path)
    for line, module, name in _imports(path):
        where = f"{path.name}:{line} imports {'.'.join(module)} {name}".rstrip()
        if own in PLAIN_TORCH:
            assert module[0] not in ("lightning", "pytorch_lightning"), f"{where}, but {own} is plain torch"
        if module[0] != "demem" or (module == ["demem"] and name == "__version__"):
            continue
        assert len(module) > 1, f"{where}: import it from its room"
        room = module[1]
        assert room in FLOORS[: FLOORS.index(own) + 1], f"{where}, which is on a higher floor"
        if room != own:
            assert len(module) == 2, f"{where}: import it from demem.{room}"
            assert not name.startswith("_"), f"{where}, which is private"


REPOSITORY = Path(__file__).resolve().parents[1]
USERS = [path for folder in ("benchmarks", "examples") for path in sorted((REPOSITORY / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_benchmarks_and_examples_use_public_names(path):
    for line, module, name in _imports(path):
        if module[0] == "demem":
            assert len(module) <= 2, (
                f"{path}:{line} imports {'.'.join(module)}.{name}: import it from demem.{module[1]}"
            )
            assert not name.startswith("_"), f"{path}:{line} imports {name}, which is private"
