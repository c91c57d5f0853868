"""Write demem's docstrings, which use Sphinx's roles and tables, in Markdown for mkdocstrings."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(func|class|meth|attr|mod|data|math):`([^`]+)`", re.DOTALL)


class Markdown(Extension):
    """Roles become links to what is documented, formulas and doctests become blocks."""

    def on_object(self, *, obj: Object, loader: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj.path)


def as_markdown(text: str, path: str) -> str:
    """The docstring of the object at ``path`` in Markdown."""
    return ROLE.sub(lambda match: _role(match[1], " ".join(match[2].split()), path), "\n".join(_blocks(text)))


def _blocks(text: str) -> list[str]:
    """Lines, with doctests, formulas, tables and literal blocks fenced."""
    lines, out, i = text.split("\n"), [], 0
    while i < len(lines):
        line, indent = lines[i], _indent(lines[i])
        if re.fullmatch(r"Example:.*", line):
            # A section of its own: mkdocstrings would take `Example:` for an admonition.
            out += ["", f"**Example.** {line.removeprefix('Example:').strip()}", ""]
            i += 1
            while i < len(lines) and (not lines[i].strip() or _indent(lines[i]) > 0):
                lines[i] = lines[i][4:]
                i += 1
            i -= next(n for n in range(1, i + 1) if re.fullmatch(r"Example:.*", lines[i - n])) - 1
            continue
        if line.strip().startswith(">>>"):
            end = next((j for j in range(i, len(lines)) if not lines[j].strip()), len(lines))
            out += ["", f"{' ' * indent}```pycon", *lines[i:end], f"{' ' * indent}```"]
            i = end
        elif line.strip().startswith(".. math::"):
            end = i + 1
            while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
                end += 1
            formula = " ".join([line.strip().removeprefix(".. math::"), *lines[i + 1 : end]]).strip()
            out += [f"{' ' * indent}$$", f"{' ' * indent}{' '.join(formula.split())}", f"{' ' * indent}$$", ""]
            i = end
        elif re.fullmatch(r"\s*=+( +=+)+", line):
            end = max(j for j in range(i, len(lines)) if re.fullmatch(r"\s*=+( +=+)+", lines[j])) + 1
            out += [f"{' ' * indent}```text", *lines[i:end], f"{' ' * indent}```"]
            i = end
        elif line.rstrip().endswith("::"):
            end = i + 1
            while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
                end += 1
            body = lines[i + 1 : end]
            out += [line.rstrip()[:-1] if line.strip() != "::" else "", "", f"{' ' * indent}```python"]
            out += [part for part in body if part.strip()] + [f"{' ' * indent}```", ""]
            i = end
        else:
            out.append(line)
            i += 1
    return out


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _role(role: str, target: str, path: str) -> str:
    if role == "math":
        return f"${target}$"
    name = target.lstrip("~")
    shown = name.rsplit(".", 1)[-1] if target.startswith("~") or role in ("func", "class", "meth", "attr") else name
    found = _documented(name, path)
    return f"[`{shown}`][{found}]" if found else f"`{shown}`"


def _documented(name: str, path: str) -> str | None:
    """Where the name, as it is used in the docstring at ``path``, is documented: in its room's public names."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        found = _public(".".join([*parts[:end], name]))
        if found:
            return found
    return _public(name)


def _public(full: str) -> str | None:
    parts = full.split(".")
    if parts[0] != "demem" or len(parts) < 2:
        return None
    room = f"demem.{parts[1]}"
    try:
        module = importlib.import_module(room)
    except ImportError:
        return None
    if len(parts) == 2:
        return room
    # The name may be given with the file that it comes from: demem.groups.inferred.Groups.
    start = 3 if len(parts) > 3 and inspect.ismodule(getattr(module, parts[2], None)) else 2
    names = parts[start:]
    if names[0].startswith("_") or names[0] not in getattr(module, "__all__", [n for n in vars(module)]):
        return None
    value = getattr(module, names[0])
    if getattr(value, "__module__", "").split(".")[:2] != parts[:2]:
        return None
    if f"{room}.{names[0]}" in sys.modules:  # a function that is called like its file, which then has its name
        names = [names[0], *names]
        return ".".join([room, *names]) if len(names) == 2 else None
    member = vars(value).get(names[1]) if len(names) == 2 and inspect.isclass(value) else None
    documented = inspect.isfunction(member) or isinstance(member, property)
    if documented and member.__doc__ and not names[1].startswith("_"):
        return f"{room}.{names[0]}.{names[1]}"
    return f"{room}.{names[0]}" if len(names) == 1 else None
