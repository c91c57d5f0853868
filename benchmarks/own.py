"""Data sets and arms of one's own, named on the command line as ``module:attribute``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from benchmarks.experiment import Method, Task


def load_task(name: str, known: Sequence[Task]) -> Task:
    """The :class:`~benchmarks.experiment.Task` that a function without arguments returns.

    Args:
        name: ``module:function``.
        known: tasks whose names are taken.

    Raises:
        ValueError: there is no such module or function, it returns something else, or its name is taken.
    """
    make = _load(name, "--data")
    task = make() if inspect.isfunction(make) and not inspect.signature(make).parameters else make
    if not isinstance(task, Task):
        raise ValueError(
            f"--data {name} must be a function without arguments that returns a benchmarks.experiment.Task, "
            f"got {type(task).__name__}."
        )
    if task.name in {other.name for other in known}:
        raise ValueError(f"--data {name}: there is a data set {task.name!r} already. Give yours another name.")
    return task


def load_methods(name: str, known: Sequence[Method]) -> list[Method]:
    """The list of :class:`~benchmarks.experiment.Method` of that name.

    Args:
        name: ``module:list``.
        known: arms whose names are taken.

    Raises:
        ValueError: there is no such module or list, it holds something else, or a name is taken.
    """
    methods = _load(name, "--methods")
    if not isinstance(methods, list | tuple) or not methods or not all(isinstance(m, Method) for m in methods):
        found = f"a list with {type(methods[0]).__name__}" if isinstance(methods, list | tuple) and methods else methods
        raise ValueError(f"--methods {name} must be a list of benchmarks.experiment.Method, got {found!r}.")
    taken = {method.name for method in known}
    for i, method in enumerate(methods):
        twins = [m for m in methods[:i] if m.label == method.label and set(m.held_out) & set(method.held_out)]
        if method.name in taken or twins:
            raise ValueError(f"--methods {name}: there is an arm {method.name!r} already. Give yours another name.")
    return list(methods)


def _load(name: str, option: str) -> Any:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError) as error:  # ValueError: an empty name
        missing = getattr(error, "name", None)
        if missing is not None and not f"{module_name}.".startswith(f"{missing}."):
            raise ValueError(f"{option} {name}: {module_name} imports {missing!r}, which is not installed.") from error
        raise ValueError(
            f"{option} {name}: there is no module {module_name!r}. Run from the folder that holds it, or put that "
            "folder on PYTHONPATH."
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ValueError(f"{option} {name}: the module {module_name!r} has no {attribute!r}.") from None
