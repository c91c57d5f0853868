"""Results on disk: one JSON object per line, appended as soon as it is measured."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

HELD_OUT = ("none", "iid", "val")
"""Held-out sources, from the least to the most that a method may train on beside the training set: nothing, a random
slice of it that is then not trained on, the benchmark's validation set."""


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Append one row and force it to disk, so that a run cut off later keeps it.

    A line that an earlier run left incomplete is closed first: the new row never sticks to it.

    Raises:
        ValueError: the row holds something that JSON cannot carry (NaN and infinity included: write ``None``).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, allow_nan=False, sort_keys=False) + "\n"
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All complete rows; a missing file has none, and lines cut off half-way are left out.

    Args:
        path: may be compressed by ``gzip``; its name then ends in ``.gz``.

    Raises:
        ValueError: a name ends in ``.gz`` and the file is not complete.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is no complete gzip file: {error}.") from error
    rows = []
    for line in content.decode("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
