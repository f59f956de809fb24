"""The value of a result asset, for any IO manager, and for each partition of a run over several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import groupby
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import dagster as dg
import orjson
from pydantic import BaseModel, ValidationError
from upath import UPath

from anybatch import (
    ConfigurationError,
    JobError,
    Outcome,
    Report,
    Row,
    join_results,
    read_results,
    write_jsonl,
)
from anybatch.rows.tally import Tally

from .inputs import split_id

if TYPE_CHECKING:
    from .options import Value

_COLUMNS = ("custom_id", "outcome", "content", "error")
_TOLD = 5  # answers that do not fit, as examples
_CHANGED = "Put it back as it was, or submit again with `force: true`, which pays for all rows once more"


@dataclass(frozen=True, slots=True)
class Made:
    """A value, and what of the answers did not fit into it: answers that succeeded but are no such model."""

    value: Any = field(repr=False)
    invalid: int = 0
    examples: tuple[str, ...] = ()


def make_value(value: Value, report: Report) -> Made:
    """What the result asset's IO manager is given.

    "path" of results.jsonl; "rows", a list of `anybatch.Row`; "dataframe" of pandas and "arrow", a table,
    with the columns custom_id, outcome, content and error, one row for each request; of a pydantic model a
    dict from custom_id to object, with those answers that are one; of a function what it makes of the
    report.
    """
    if isinstance(value, type):
        return _objects(value, report)
    if not isinstance(value, str):
        return Made(value(report))
    match value:
        case "path":
            return Made(report.results)
        case "rows":
            return Made(list(landed_rows(report)))
        case "dataframe":
            frame = _module("pandas", value).DataFrame(list(answers(report)), columns=list(_COLUMNS))
            return Made(frame)
        case "arrow":
            columns = {name: [answer[name] for answer in answers(report)] for name in _COLUMNS}
            return Made(_module("pyarrow", value).table(columns))
        case _:
            return Made(None)


def landed_rows(report: Report) -> Iterator[Row]:
    """All rows of a job. A file that is shorter than its report says must not pass for the whole."""
    count = 0
    try:
        for row in read_results(UPath(report.results)):
            count += 1
            yield row
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(
            f"{report.results} is not as it landed, in line {count + 1}: {error}. {_CHANGED}"
        ) from error
    if count != report.rows:
        raise JobError(
            f"{report.results} is not as it landed: it has {count:,} rows, and its report counts "
            f"{report.rows:,}. {_CHANGED}"
        )


def answers(report: Report) -> Iterator[dict[str, Any]]:
    """Each row's custom_id, outcome, content (a chat's text, an embedding's vector …) and error."""
    ids = ({"custom_id": row.custom_id} for row in landed_rows(report))
    yield from join_results(ids, report.results, id_column="custom_id")


def _objects(model: type[BaseModel], report: Report) -> Made:
    objects: dict[str, BaseModel] = {}
    invalid = 0
    examples: list[str] = []
    for answer in answers(report):
        content = answer["content"]
        if answer["outcome"] != Outcome.SUCCEEDED:
            continue
        try:
            read = model.model_validate_json if isinstance(content, str | bytes) else model.model_validate
            objects[answer["custom_id"]] = read(content)
        except ValidationError as error:
            invalid += 1
            if len(examples) < _TOLD:
                first = error.errors(include_url=False, include_input=False)[0]
                place = ".".join(map(str, first["loc"]))
                told = answer["error"] or f"{place + ': ' if place else ''}{first['msg']}"
                examples.append(f"{answer['custom_id']}: {told}")
    return Made(objects, invalid, tuple(examples))


def _module(name: str, value: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ConfigurationError(f"value={value!r} needs {name}: pip install {name}") from None


# --- several partitions ------------------------------------------------------------------------------------


def split_report(
    report: Report, partitions: Sequence[str], price: tuple[float, float] | None = None
) -> dict[str, Report]:
    """The account of each partition of a run over several, with a results.jsonl and ids of its own.

    Tokens and cost are those of the partition's rows as they landed; what earlier rounds of them have cost is
    in the job's report alone.
    """
    folder = UPath(report.results).parent / "partitions"
    parts = {}
    rows = landed_rows(report)
    for key, group in groupby(rows, key=lambda row: split_id(row.custom_id)[0]):  # in the input's order
        parts[key] = _part(report, folder, key, group, price)
    for key in set(partitions) - parts.keys():  # nothing was asked for these
        parts[key] = _part(report, folder, key, (), price)
    return parts


def _part(
    report: Report, folder: UPath, partition: str, rows: Iterable[Row], price: tuple[float, float] | None
) -> Report:
    tally = Tally()
    path = folder / quote(partition, safe="").replace("..", "%2E%2E") / "results.jsonl"

    def lines() -> Iterator[dict[str, Any]]:
        for row in rows:
            tally.counts[row.outcome] += 1
            if row.outcome is Outcome.SUCCEEDED and row.result is not None:
                tally.add_body(row.result)
            yield {**orjson.loads(row.raw), "custom_id": split_id(row.custom_id)[1]}

    count = write_jsonl(path, lines())
    told = {
        "job": f"{report.job}#{partition}",
        "results": str(path),
        "rows": count,
        "counts": {outcome: tally.counts[outcome] for outcome in Outcome},
        "unexpected": 0,
        "usage": tally.usage,
        "cost": tally.cost_at(price),
    }
    return report.model_copy(update=told)


def hand_over(
    context: dg.AssetExecutionContext, key: dg.AssetKey, io_manager_key: str, values: Mapping[str, Any]
) -> None:
    """Give the IO manager each partition's value on its own.

    Dagster hands over one value for all partitions of a run, which most IO managers refuse; for one partition
    every IO manager has a way, and loads several together again as a mapping.
    """
    output = context.assets_def.get_output_name_for_asset_key(key)
    io_manager = getattr(context.resources, io_manager_key)
    spec = context.assets_def.get_asset_spec(key)
    for partition, value in values.items():
        target = dg.build_output_context(
            step_key=str(context.op_execution_context.op_handle),
            name=output,
            run_id=context.run.run_id,
            definition_metadata=context.op_def.output_def_named(output).metadata,
            dagster_type=context.op_def.output_def_named(output).dagster_type,
            asset_key=key,
            asset_spec=spec,
            partition_key=partition,
            asset_partitions_def=context.assets_def.partitions_def,
            instance=context.instance,
        )
        io_manager.handle_output(target, value)
        if told := target.get_logged_metadata():
            context.add_asset_metadata(told, asset_key=key, partition_key=partition)
