"""Command lines of the benchmarks."""

from __future__ import annotations

import argparse
from typing import Any

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
