"""The rooms of the house: what each imports, and from where."""

import ast
from pathlib import Path

import pytest

import demem

ROOT = Path(demem.__file__).parent
# From the ground up; a file imports from its own floor or from one below.
FLOORS = ("batch", "sites", "linear", "measures", "tracing", "metrics")
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0].removesuffix(".py") in FLOORS]


def _imports(path):
    """(line, module, name) of everything that a file imports from demem."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "demem":
            for alias in node.names:
                yield node.lineno, node.module.split("."), alias.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_ground_floors_import_through_doors_and_never_upwards(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for line, module, name in _imports(path):
        where = f"{path.name}:{line} imports {'.'.join(module)}.{name}"
        room = module[1]
        assert room in FLOORS[: FLOORS.index(own) + 1], f"{where}, which is on a higher floor"
        if room != own:
            assert len(module) == 2, f"{where}: import it from demem.{room}"
            assert not name.startswith("_"), f"{where}, which is private"
