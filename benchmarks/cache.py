"""Arrays that are computed once and kept on disk: the outputs of frozen layers.

Each array lies in a file of its own, beside a record of its shape, dtype, length and checksum.  Both are written under
another name and renamed when complete, so a run that is cut off goes on with the next array.  An array that does not
match its record is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

Create = Callable[[tuple[int, ...], Any], np.ndarray]
"""Takes a shape and a dtype and gives the array on disk to write into."""
Make = Callable[[Create], None]
"""Calls its argument once and fills what it gets."""
Progress = Callable[[str, int, int], None]
"""Called with an array's name, the number of examples done and the number of examples in all."""

CHUNK = 1 << 22  # bytes per read of a checksum
_checked: dict[Path, tuple[int, ...]] = {}  # sizes and times of files whose checksum this process has seen to be right


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/demem``, or ``~/.cache/demem``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "demem"


def find_or_make(
    parent: Path | None,
    name: str,
    made_from: Mapping[str, Any],
    arrays: Mapping[str, Make],
    say: Callable[[str], None] = print,
) -> Path:
    """The folder ``parent/name-HASH`` with all arrays in it; those that are missing or damaged are computed.

    Args:
        parent: folder of all caches; default :func:`default_cache`.
        name: start of the folder's name.
        made_from: everything the arrays follow from (data, weights, sizes, views), as JSON takes it.  HASH is its hash,
            so other data or weights have another folder.
        arrays: how to compute each array, by name, in the order in which missing ones are made.
        say: told in one line about each array that is made again because it is damaged.

    Returns:
        The folder; :func:`read` opens an array in it.

    Raises:
        ValueError: an array does not fit on the disk.
    """
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    folder = (parent or default_cache()) / f"{name}-{key}"
    for array, make in arrays.items():
        fault = _fault(folder, array)
        if fault is None:
            continue
        if (folder / f"{array}.npy").exists():
            say(f"{folder / array}.npy {fault}: it is computed again.")
        folder.mkdir(parents=True, exist_ok=True)
        _make(folder, array, make)
    _write_json(folder / "made_from.json", made_from)
    return folder


def read(folder: Path, array: str) -> Tensor:
    """An array of a cache as a tensor; pages are read from disk as they are needed and shared between processes."""
    return torch.from_numpy(np.load(folder / f"{array}.npy", mmap_mode="c"))  # copy-on-write: the file stays as it is


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _make(folder: Path, array: str, make: Make) -> None:
    path = folder / f"{array}.npy"
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    made: list[Any] = []

    def create(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size, free = int(np.prod(shape)) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
        if size > free:  # writing to a full disk through a memory map would end the process without a message
            raise ValueError(
                f"{path} needs {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left. Free some, or name "
                "another folder with --cache."
            )
        made.append(open_memmap(partial, mode="w+", dtype=dtype, shape=shape))
        rows: np.ndarray = made[0]
        return rows

    try:
        make(create)
        rows = made.pop()
        rows.flush()
        record = {
            "shape": list(rows.shape),
            "dtype": rows.dtype.str,
            "bytes": partial.stat().st_size,
            "sha256": file_hash(partial),
        }
        del rows  # a mapped file cannot be renamed everywhere
        os.replace(partial, path)
        _write_json(path.with_suffix(".json"), record)
        _checked[path] = _state(path)
    finally:
        made.clear()
        partial.unlink(missing_ok=True)


def _fault(folder: Path, array: str) -> str | None:
    """Why an array cannot be used, or ``None``.  A checksum is computed once per process and state of the file."""
    path, record = folder / f"{array}.npy", folder / f"{array}.json"
    try:
        state = _state(path)
        if _checked.get(path) == state:
            return None
        noted = json.loads(record.read_text())
        if state[0] != noted["bytes"]:
            return f"has {state[0]} bytes instead of {noted['bytes']}"
        rows = np.load(path, mmap_mode="r")
        if (list(rows.shape), rows.dtype.str) != (noted["shape"], noted["dtype"]):
            return f"holds {rows.dtype} {rows.shape} instead of {noted['dtype']} {tuple(noted['shape'])}"
        if file_hash(path) != noted["sha256"]:
            return "does not have the checksum it was written with"
    except (OSError, ValueError, KeyError, TypeError) as error:  # no such file, no JSON, no array
        return f"or its record cannot be read ({type(error).__name__})"
    _checked[path] = state
    return None


def _state(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)
