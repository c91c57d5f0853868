"""Packages that bring data or weights for one benchmark, and what to install where they are missing."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def require(package: str, extra: str) -> Path:
    """The folder of an installed package; nothing in it is imported.

    Args:
        package: its import name.
        extra: the extra of this project that installs it.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"The package {package} is not installed: pip install -e '.[{extra}]'")
    return Path(next(iter(spec.submodule_search_locations)))


def version_of(package: str) -> str:
    """The installed version of a package (import name), or ``"unknown"``."""
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "unknown"
