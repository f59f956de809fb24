"""The value that the result asset's IO manager stores, in a run over several partitions one for each."""

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
_MAX_EXAMPLES = 5  # answers that do not fit the model
_CHANGED = "Restore the file, or submit again with `force: true`, which pays for all rows once more"


@dataclass(frozen=True, slots=True)
class AssetValue:
    """A value for the IO manager.

    Attributes:
        value: The value.
        invalid: How many answers succeeded, but do not fit the pydantic model.
        examples: What is wrong with the first of these.
    """

    value: Any = field(repr=False)
    invalid: int = 0
    examples: tuple[str, ...] = ()


def make_value(value: Value, report: Report) -> AssetValue:
    """The value for the result asset's IO manager.

    Args:
        value: "path" of results.jsonl; "rows", a list of `anybatch.Row`; "dataframe" of pandas and "arrow", a
            table with the columns custom_id, outcome, content and error, one row for each request; "none"; a
            pydantic model, for a dict from custom_id to object with the answers that fit it; or a function of
            the report.
        report: The landed job.

    Raises:
        ConfigurationError: "dataframe" or "arrow" needs a package that is not installed.
        JobError: results.jsonl was changed after it landed.
    """
    if isinstance(value, type):
        return _objects(value, report)
    if not isinstance(value, str):
        return AssetValue(value(report))
    match value:
        case "path":
            return AssetValue(report.results)
        case "rows":
            return AssetValue(list(landed_rows(report)))
        case "dataframe":
            frame = _module("pandas", value).DataFrame(list(answers(report)), columns=list(_COLUMNS))
            return AssetValue(frame)
        case "arrow":
            columns = {name: [answer[name] for answer in answers(report)] for name in _COLUMNS}
            return AssetValue(_module("pyarrow", value).table(columns))
        case _:
            return AssetValue(None)


def landed_rows(report: Report) -> Iterator[Row]:
    """All rows of a job.

    Raises:
        JobError: results.jsonl was changed after it landed; a shorter file must not pass for the whole.
    """
    count = 0
    try:
        for row in read_results(UPath(report.results)):
            count += 1
            yield row
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(
            f"{report.results} was changed after it landed, in line {count + 1}: {error}. {_CHANGED}"
        ) from error
    if count != report.rows:
        raise JobError(
            f"{report.results} was changed after it landed: it has {count:,} rows, and its report counts "
            f"{report.rows:,}. {_CHANGED}"
        )


def answers(report: Report) -> Iterator[dict[str, Any]]:
    """Each row's custom_id, outcome, content (a chat's text, an embedding's vector …) and error."""
    ids = ({"custom_id": row.custom_id} for row in landed_rows(report))
    yield from join_results(ids, report.results, id_column="custom_id")


def _objects(model: type[BaseModel], report: Report) -> AssetValue:
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
            if len(examples) < _MAX_EXAMPLES:
                first = error.errors(include_url=False, include_input=False)[0]
                place = ".".join(map(str, first["loc"]))
                reason = answer["error"] or f"{place + ': ' if place else ''}{first['msg']}"
                examples.append(f"{answer['custom_id']}: {reason}")
    return AssetValue(objects, invalid, tuple(examples))


def _module(name: str, value: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ConfigurationError(f"value={value!r} needs {name}: pip install {name}") from None


# --- several partitions ------------------------------------------------------------------------------------


def split_report(
    report: Report, partitions: Sequence[str], price: tuple[float, float] | None = None
) -> dict[str, Report]:
    """The report of each partition of a run over several, with its own results.jsonl and the user's own ids.

    Tokens and cost are those of the partition's rows as they landed. What earlier rounds of these rows cost
    is in the job's report only.
    """
    folder = UPath(report.results).parent / "partitions"
    parts = {}
    rows = landed_rows(report)
    for key, group in groupby(rows, key=lambda row: split_id(row.custom_id)[0]):  # in the input's order
        parts[key] = _part(report, folder, key, group, price)
    for key in set(partitions) - parts.keys():  # partitions without requests
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
    own = {
        "job": f"{report.job}#{partition}",
        "results": str(path),
        "rows": count,
        "counts": {outcome: tally.counts[outcome] for outcome in Outcome},
        "unexpected": 0,
        "usage": tally.usage,
        "cost": tally.cost_at(price),
    }
    return report.model_copy(update=own)


def store_partition_values(
    context: dg.AssetExecutionContext, key: dg.AssetKey, io_manager_key: str, values: Mapping[str, Any]
) -> None:
    """Give the IO manager each partition's value on its own.

    Dagster would pass one value for all partitions of a run, which most IO managers refuse. Every IO manager
    can store a single partition's value, and loads several together as a mapping.
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
        if logged := target.get_logged_metadata():
            context.add_asset_metadata(logged, asset_key=key, partition_key=partition)
