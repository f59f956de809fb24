"""Keep keys out of tracebacks, which show function arguments."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


class Key(str):
    """A key whose repr hides it: error trackers print the local variables of every frame."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'**********'"


def hides_key(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that it receives its keyword `api_key` as a Key."""
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
            _hide(kwargs)
            return await function(*args, **kwargs)

        return cast("Callable[P, R]", awaited)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        _hide(kwargs)
        return function(*args, **kwargs)

    return called


def _hide(kwargs: dict[str, Any]) -> None:
    if isinstance(kwargs.get("api_key"), str):
        kwargs["api_key"] = Key(kwargs["api_key"])
