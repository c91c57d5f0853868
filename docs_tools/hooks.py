"""mkdocs hooks: pages that lie elsewhere in the repository, the README's table, and formulas without JavaScript."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*.md", "benchmarks/*.png", "benchmarks/rows/*.gz")
EXAMPLES = ("examples/*.md", "examples/*.py", "examples/*.ipynb")
TABLE = "<!-- the table of the README -->"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages and files of the repository that the documentation links to."""
    for pattern in (*ELSEWHERE, *EXAMPLES):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in the README's table of results, so that the figures are in one place."""
    return markdown.replace(TABLE, _table()) if TABLE in markdown else markdown


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML, which browsers show by themselves."""
    return FORMULA.sub(_mathml, content)


def _table() -> str:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("|") and "ERM" in line), None)
    if start is None:
        raise PluginError("README.md has no table with a column ERM, which docs/when.md shows.")
    rows = lines[start:]
    end = next((i for i, line in enumerate(rows) if not line.startswith("|")), len(rows))
    return "\n".join(rows[:end])


def _mathml(match: re.Match[str]) -> str:
    return convert(html.unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")
