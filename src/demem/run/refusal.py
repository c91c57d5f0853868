"""Say which callback refuses a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def names_itself(hook: _Hook) -> _Hook:
    """Put the callback's name before the message of an error that a hook raises because of what it was given.

    Example:
        >>> class Remover:
        ...     @names_itself
        ...     def on_fit_start(self):
        ...         raise ValueError("There is no head.")
        >>> Remover().on_fit_start()
        Traceback (most recent call last):
        ValueError: Remover: There is no head.
    """

    @wraps(hook)
    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return hook(self, *args, **kwargs)
        except (TypeError, ValueError) as error:
            name = type(self).__name__
            if error.args and isinstance(error.args[0], str) and not error.args[0].startswith(name):
                error.args = (f"{name}: {error.args[0]}", *error.args[1:])
            raise

    return named  # type: ignore[return-value]
