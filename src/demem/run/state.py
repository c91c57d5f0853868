"""Read a callback's state from a checkpoint that another version may have written."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from demem import __version__

_State = TypeVar("_State", bound=Callable[..., Any])


def with_version(state_dict: _State) -> _State:
    """Add the version of demem to a callback's ``state_dict``, for the message of :func:`checks_version`."""

    @wraps(state_dict)
    def versioned(self: Any) -> dict[str, Any]:
        return {**state_dict(self), "version": __version__}

    return versioned  # type: ignore[return-value]


def checks_version(load: _State) -> _State:
    """Refuse a state of other entries than this version writes, with what to do, instead of a ``KeyError``.

    Example:
        >>> class Monitor:
        ...     @with_version
        ...     def state_dict(self):
        ...         return {"history": []}
        ...
        ...     @checks_version
        ...     def load_state_dict(self, state):
        ...         self.history = state["history"]
        >>> Monitor().load_state_dict({"rows": [], "version": "0.0.1"})
        Traceback (most recent call last):
        ValueError: Monitor cannot read its state in this checkpoint, which demem 0.0.1 wrote and this is demem ...
    """

    @wraps(load)
    def checked(self: Any, state: dict[str, Any]) -> None:
        expected = self.state_dict().keys() - {"version"}
        given = state.keys() - {"version"}
        if given != expected:
            lacks, unknown = sorted(expected - given), sorted(given - expected)
            reason = "; ".join(
                f"{what} {', '.join(map(repr, names))}"
                for what, names in (("it lacks", lacks), ("it has unknown", unknown))
                if names
            )
            raise _other_version(self, state, reason)
        try:
            load(self, state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise _other_version(self, state, f"{type(error).__name__}: {error}") from error

    return checked  # type: ignore[return-value]


def _other_version(callback: Any, state: dict[str, Any], reason: str) -> ValueError:
    writer = f"demem {state['version']}" if "version" in state else "an unknown version of demem"
    return ValueError(
        f"{type(callback).__name__} cannot read its state in this checkpoint, which {writer} wrote and this is demem "
        f"{__version__}: {reason}. Resume with the version that wrote it, or start a new fit from its weights: "
        "model.load_state_dict(torch.load(path, weights_only=True)['state_dict'])."
    )
