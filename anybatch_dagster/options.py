"""The options of a batch asset, by the names that `anybatch.Job` and the Airflow operator use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeAlias, get_args

import dagster as dg
from pydantic import BaseModel

from anybatch import Job, Report
from anybatch.jobs.options import (
    KeepRequests,
    OnChanged,
    OnLost,
    OnOrphan,
    OnPartial,
    OnTimeout,
    OnUntranslatable,
    Part,
    options_of,
    wrong_choice,
)

ValueName: TypeAlias = Literal["path", "rows", "dataframe", "arrow", "none"]
Value: TypeAlias = ValueName | type[BaseModel] | Callable[[Report], Any]
Prompt: TypeAlias = str | Callable[[dict[str, Any]], Any]
IdColumn: TypeAlias = str | Callable[[dict[str, Any]], object]

_VALUES = get_args(ValueName)


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The options of a batch asset, checked when definitions load."""

    resource_key: str
    model: str | None
    endpoint: str
    completion_window: str
    metadata: Mapping[str, str]
    options: Mapping[str, Any]
    output: str | None
    prompt: Prompt | None = field(repr=False)
    id_column: IdColumn | None
    system: str | None = field(repr=False)
    body: Mapping[str, Any]
    on_orphan: OnOrphan
    on_changed: OnChanged
    on_untranslatable: OnUntranslatable
    on_lost: OnLost
    shard_requests: int | None
    keep_requests: KeepRequests
    max_rounds: int
    on_partial: OnPartial
    max_failed_ratio: float | None
    timeout: timedelta
    on_timeout: OnTimeout
    price: tuple[float, float] | None
    value: Value = field(repr=False)

    def __post_init__(self) -> None:
        for one in options_of(Part.JOB, Part.RUN):
            if one.choices and (wrong := wrong_choice(one.name, getattr(self, one.name))):
                raise _invalid(wrong)
        value: Any = self.value
        fits = issubclass(value, BaseModel) if isinstance(value, type) else callable(value)
        if not fits and value not in _VALUES:
            raise _invalid(f"value: {', '.join(_VALUES)}, a pydantic model or a function, not {self.value!r}")
        only = [name for name in ("id_column", "system", "body") if getattr(self, name)]
        if only and self.prompt is None:
            raise _invalid(f"{' and '.join(only)}: only with `prompt`, which makes requests from a table")
        if self.prompt is not None and self.model is None:
            raise _invalid("`prompt` makes requests from a table, and each request needs a `model`")

    def job(self, requests: Any, folder: str, identity: str, *, restart: str | None = None) -> Job:
        return Job(
            input=requests,
            output=folder,
            id=identity,
            model=self.model,
            endpoint=self.endpoint,
            completion_window=self.completion_window,
            metadata=self.metadata,
            options=self.options,
            on_orphan=self.on_orphan,
            on_changed=self.on_changed,
            on_untranslatable=self.on_untranslatable,
            on_lost=self.on_lost,
            shard_requests=self.shard_requests,
            keep_requests=self.keep_requests,
            max_rounds=self.max_rounds,
            price=self.price,
            restart=restart,
        )


def _invalid(message: str) -> dg.DagsterInvalidDefinitionError:
    return dg.DagsterInvalidDefinitionError(message)
