"""Write files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_writable(folder: str | Path) -> None:
    """Make a folder, and find out now whether files can be written there.

    Raises:
        ValueError: they cannot.

    Example:
        >>> check_writable("new/folder")
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"The report cannot be written to {folder}: {error}") from error


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write a file beside its place and rename it, so that a full disk or a crash leaves what was there before.

    Example:
        >>> write_whole("new/folder/words.txt", "words").read_text()
        'words'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # a temporary file is its owner's alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path
