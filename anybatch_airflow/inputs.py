"""Where an operator's requests are, and how they stay out of Jinja, XCom and the metadata database."""

from __future__ import annotations

import ast
import os
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import TypeAlias

    from airflow.providers.common.compat.sdk import Context, XComArg

    BatchIds: TypeAlias = "str | Sequence[str] | XComArg"
    Requests: TypeAlias = (
        "str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Callable[..., Any] | XComArg"
    )
    Prompt: TypeAlias = "str | Callable[[dict[str, Any]], Any]"
    IdColumn: TypeAlias = "str | Callable[[dict[str, Any]], object]"


class Hidden:
    """Requests, or a function that makes them, in a form that Airflow can neither render nor store."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        # Goes into the serialized DAG and the rendered fields: no content, no memory address.
        if callable(self.value):
            return f"<{getattr(self.value, '__qualname__', type(self.value).__qualname__)}()>"
        try:
            return f"<{len(self.value)} requests>"
        except TypeError:
            return "<requests>"


class InputField:
    """An operator's attribute that keeps a path as it is, and wraps anything else in `Hidden`."""

    def __get__(self, operator: Any, kind: type) -> Any:
        return self if operator is None else operator._input

    def __set__(self, operator: Any, value: Any) -> None:
        # Every way in passes here: the constructor, the rendering of a template, the resolving of an XCom.
        operator._input = plain(value) if is_shown(value) else Hidden(value)


class HasOutput:
    """An operator with the option `output`, kept as `output_folder`.

    On every operator of Airflow's, `output` is what the task will push, as an XCom for other tasks. So the
    attribute and the templated field are named otherwise than the argument. Airflow 3.3 takes the two for one
    in a single place: an XCom given to `.partial` makes its task an upstream one if a templated field has
    the argument's name.
    """

    output_folder: Any

    def __new__(cls, *_args: Any, **kwargs: Any) -> Self:
        _refuse_old_name(cls, kwargs)
        return super().__new__(cls)

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """As on any operator; an XCom is no folder for all mapped tasks, since each needs its own."""
        _refuse_old_name(cls, kwargs)
        output = kwargs.get("output")
        if not is_path(output) and hasattr(type(output), "resolve"):
            raise TypeError(
                f"{cls.__name__}.partial(output=…): an XCom would be one folder for all mapped tasks, and "
                "each needs its own; give it to .expand(output=…), or a path with {{ ti.map_index }} in it"
            )
        return super().partial(**kwargs)  # type: ignore[misc]  # the operator's


def _refuse_old_name(operator: type, kwargs: Mapping[str, Any]) -> None:
    # Looked at before `__init__`, where Airflow would say no more than that `output` is missing.
    if "output_folder" in kwargs:
        name = getattr(operator, "custom_operator_name", operator.__name__)
        raise TypeError(f"{name}: the folder is given as `output`, not `output_folder`")


def is_shown(value: Any) -> bool:
    """Whether Airflow may see an input as it is: a path, or the XCom that will be one or be hidden."""
    # Of the type: a frame may have a column of that name, and would be rendered and stored.
    return isinstance(value, Hidden) or is_path(value) or hasattr(type(value), "resolve")


def read_input(value: Any, context: Context) -> Any:
    """The path or the requests (or the table) that `input` stands for; a function is called."""
    if isinstance(value, Hidden):
        value = value.value
    if callable(value):
        from airflow.providers.common.compat.sdk import determine_kwargs

        value = value(**determine_kwargs(value, [], context))
    return location(value) if is_path(value) else value


def requests_from(
    value: Any,
    *,
    prompt: Prompt | None,
    id_column: IdColumn | None,
    model: str | None,
    endpoint: str,
    system: str | None,
    body: Mapping[str, Any] | None,
) -> Any:
    """What `anybatch.Job` takes as input: `value` as it is, or with a prompt the requests of its rows."""
    from anybatch import ConfigurationError, build_requests

    if prompt is None:
        if only := [
            name for name, given in (("id_column", id_column), ("system", system), ("body", body)) if given
        ]:
            raise ConfigurationError(
                f"{' and '.join(only)}: only with `prompt`, which makes requests of a table"
            )
        return value
    if model is None:
        raise ConfigurationError("`prompt` makes requests of a table, and they need `model`")
    return build_requests(
        value, prompt, model=model, id_column=id_column, endpoint=endpoint, system=system, **dict(body or {})
    )


def plain(value: Any) -> Any:
    """A local path as its text: Airflow 3.1 takes a Path in a templated field for an XCom to resolve."""
    return os.fspath(value) if isinstance(value, PurePath) and not hasattr(type(value), "fs") else value


def is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) or hasattr(type(value), "fs")


def location(value: Any) -> Any:
    """A local path, or one on an object store with the Airflow connection that its URL names."""
    if not isinstance(value, str):
        return value
    scheme, separator, rest = value.partition("://")
    if not separator:
        return Path(value)
    from airflow.sdk.io import has_fs

    if "@" not in rest.partition("/")[0] and not has_fs(scheme):
        return value  # a store that fsspec knows and no Airflow provider does
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    return ObjectStoragePath(value)


def batch_ids(value: Any) -> list[str]:
    """One id or several, as given to a sensor: in a template a list has become its text.

    Raises ConfigurationError where there is none.
    """
    from anybatch import ConfigurationError

    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise ConfigurationError(f"batch_id is neither an id nor a list of ids: {value!r}") from None
    ids: list[Any] = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(one, str) and one.strip() for one in ids):
        raise ConfigurationError(f"batch_id holds something that is no id: {ids!r}")
    if not ids:
        raise ConfigurationError("batch_id is empty: there is no batch")
    return list(dict.fromkeys(ids))
