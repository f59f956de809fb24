"""The options `input`, `prompt`, `output` and `batch_id`, as tasks read them.

Requests are kept out of Jinja, XCom and the metadata database here.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Self

from anybatch.jobs.options import wrong_choice

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
    """Wraps requests, or a function that makes them, so that Airflow neither renders nor stores them."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        # Airflow stores this text in the serialized DAG and the rendered fields: no content, and no memory
        # address, which would make each parse a new version of the DAG.
        if callable(self.value):
            return f"<{getattr(self.value, '__qualname__', type(self.value).__qualname__)}()>"
        try:
            return f"<{len(self.value)} requests>"
        except TypeError:
            return "<requests>"


class InputField:
    """The attribute `input` of an operator: it keeps a path as it is, and wraps anything else in `Hidden`."""

    def __get__(self, operator: Any, kind: type) -> Any:
        return self if operator is None else operator._input

    def __set__(self, operator: Any, value: Any) -> None:
        # The constructor, Airflow's template rendering and its resolving of XComs all assign here.
        operator._input = plain(value) if is_shown(value) else Hidden(value)


class HasOutput:
    """An operator with the option `output`, stored as the attribute `output_folder`.

    On every operator of Airflow's, the attribute `output` is the XCom that the task will push, so the folder
    needs another name, as attribute and as template field. One place in Airflow 3.3 assumes that a template
    field has its argument's name: an XCom given to `.partial` makes its task an upstream task only then.
    `partial` below refuses that case.
    """

    output_folder: Any

    def __new__(cls, *_args: Any, **kwargs: Any) -> Self:
        _refuse_old_name(cls, kwargs)
        return super().__new__(cls)

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """As on any operator, but refuses an XCom as `output`: one folder for all mapped tasks."""
        _refuse_old_name(cls, kwargs)
        output = kwargs.get("output")
        if not is_path(output) and hasattr(type(output), "resolve"):
            raise TypeError(
                f"{cls.__name__}.partial(output=…): an XCom would give all mapped tasks one folder, and "
                "each needs its own. Pass it to .expand(output=…), or a path with {{ ti.map_index }} in it"
            )
        return super().partial(**kwargs)  # type: ignore[misc]  # the operator's


def _refuse_old_name(operator: type, kwargs: Mapping[str, Any]) -> None:
    # Checked before `__init__`, in which Airflow would only say that `output` is missing.
    if "output_folder" in kwargs:
        name = getattr(operator, "custom_operator_name", operator.__name__)
        raise TypeError(f"{name}: name the folder `output`; `output_folder` is no argument")


def checked_choice(name: str, value: Any) -> Any:
    """The value of an option; checked while the DAG is parsed.

    Raises:
        ValueError: It is none of the option's choices.
    """
    if (wrong := wrong_choice(name, value)) is not None:
        raise ValueError(wrong)
    return value


def is_shown(value: Any) -> bool:
    """Whether Airflow may see an input as it is: a path, an XCom that is still to come, or a `Hidden`."""
    # Ask the type: a DataFrame may have a column called `resolve`, and Airflow would then store the frame.
    return isinstance(value, Hidden) or is_path(value) or hasattr(type(value), "resolve")


def read_input(value: Any, context: Context) -> Any:
    """The path, requests or table that `input` stands for; calls it if it is a function."""
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
    """What `anybatch.Job` takes as input: `value` itself, or with a prompt the requests made from its rows.

    Raises:
        ConfigurationError: An option that needs `prompt` is given without it, or `prompt` without `model`.
    """
    from anybatch import ConfigurationError, build_requests

    if prompt is None:
        if only := [
            name for name, given in (("id_column", id_column), ("system", system), ("body", body)) if given
        ]:
            raise ConfigurationError(
                f"{' and '.join(only)}: only with `prompt`, which makes requests from a table. Give a "
                "`prompt`, or leave this out"
            )
        return value
    if model is None:
        raise ConfigurationError("`prompt` makes requests from a table, and each request needs a `model`")
    return build_requests(
        value, prompt, model=model, id_column=id_column, endpoint=endpoint, system=system, **dict(body or {})
    )


def plain(value: Any) -> Any:
    """A local path as text: Airflow 3.1 mistakes a Path in a template field for an XCom to resolve."""
    return os.fspath(value) if isinstance(value, PurePath) and not hasattr(type(value), "fs") else value


def is_path(value: Any) -> bool:
    """Whether a value is a path or URL: a text, a path object, or one of Airflow's ObjectStoragePath."""
    return isinstance(value, (str, os.PathLike)) or hasattr(type(value), "fs")


def location(value: Any) -> Any:
    """A path to open: local, or on an object store with the Airflow connection that its URL names."""
    if not isinstance(value, str):
        return value
    scheme, separator, rest = value.partition("://")
    if not separator:
        return Path(value)
    from airflow.sdk.io import has_fs

    if "@" not in rest.partition("/")[0] and not has_fs(scheme):
        return value  # fsspec knows this store, no Airflow provider does
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    return ObjectStoragePath(value)


def batch_ids(value: Any) -> list[str]:
    """The ids that `batch_id` names: one, several, or a list that a template has rendered as text.

    Raises:
        ConfigurationError: There is no id, or something that is not one.
    """
    from anybatch import ConfigurationError

    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            raise ConfigurationError(f"batch_id is neither an id nor a list of ids: {value!r}") from None
    ids: list[Any] = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(one, str) and one.strip() for one in ids):
        raise ConfigurationError(f"batch_id holds something that is not an id: {ids!r}")
    if not ids:
        raise ConfigurationError("batch_id is empty: name at least one batch")
    return list(dict.fromkeys(ids))
