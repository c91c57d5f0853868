"""Command lines of the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.results import read_jsonl
from demem.cli import did_you_mean


class Parser(argparse.ArgumentParser):
    """Takes options by their whole names only, and names the nearest one to another.

    Args:
        command: the words after ``python -m benchmarks``.
        description: what it does.
    """

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(f"python -m benchmarks {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """End the program with the message and, after a misspelt option, the one that may be meant."""
        unknown = message.partition("unrecognized arguments: ")[2].split()
        return super().error(message + "." * bool(unknown) + did_you_mean(unknown, self._option_string_actions))


def known_names(option: str, given: str, known: Iterable[str]) -> list[str]:
    """The names in a comma-separated list.

    Args:
        option: that they are given to, without dashes.
        given: the list.
        known: names that there are.

    Raises:
        ValueError: there is none of such a name.

    >>> known_names("data", "digits,solar", ("digits", "solar", "waterbirds"))
    ['digits', 'solar']
    """
    names, there = given.split(","), list(known)
    unknown = sorted(set(names) - set(there))
    if unknown:
        raise ValueError(f"--{option} {','.join(unknown)}: there are {', '.join(there)}.")
    return names


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that ``--rows`` names, for tables of what was measured before.

    Raises:
        ValueError: there are none.
    """
    if not (rows := read_jsonl(path)):
        raise ValueError(f"--rows {path}: there are no rows.")
    return rows
