"""What the user's function returned, as request lines, with the partition of each in a run over several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from anybatch import ConfigurationError, InputError, build_requests
from anybatch.rows.tables import read_requests

if TYPE_CHECKING:
    from .options import JobOptions


def request_lines(given: Any, options: JobOptions, partitions: Sequence[str]) -> Any:
    """Request lines, or the path of a file of them: what `anybatch.Job` takes as input.

    A run over several partitions has one batch for all of them. Its function returns a mapping from partition
    key to requests (or table), which is also how Dagster loads an upstream asset there. The partition key
    then goes in front of each custom_id, so that the answers can be assigned to their partitions.

    Raises:
        ConfigurationError: The function returned None, a mapping with wrong keys, or no mapping though the
            run is over several partitions.
    """
    if isinstance(given, Mapping):
        if unknown := sorted(map(str, given.keys() - set(partitions))):
            run = ", ".join(partitions[:3]) + (", …" if len(partitions) > 3 else "")
            raise ConfigurationError(
                "the function returned a mapping with keys that are not partitions of this run: "
                f"{', '.join(unknown[:3])} "
                f"(the run is of {run or 'no partition'})"
            )
        if len(partitions) == 1:
            return _lines(given.get(partitions[0], ()), options)
        # In the run's order: Dagster loads an upstream asset's partitions in an order that differs between
        # processes, and other bytes would be another job.
        return _partitioned({key: given[key] for key in partitions if key in given}, options)
    if len(partitions) > 1 and options.value != "none":
        raise ConfigurationError(
            f"this run covers {len(partitions)} partitions, and its requests do not say which partition each "
            "is for: return a mapping from partition key to requests, {key: … for key in "
            'context.partition_keys}, or set value="none"'
        )
    return _lines(given, options)


def _lines(given: Any, options: JobOptions) -> Any:
    if given is None:
        raise ConfigurationError(
            "the function returned None: yield requests, or return them, a table or a path"
        )
    if options.prompt is None:
        return given
    assert options.model is not None  # JobOptions checks that
    return build_requests(
        given,
        options.prompt,
        model=options.model,
        id_column=options.id_column,
        endpoint=options.endpoint,
        system=options.system,
        **options.body,
    )


def _partitioned(given: Mapping[str, Any], options: JobOptions) -> Iterator[Mapping[str, Any]]:
    for partition, part in given.items():
        try:
            yield from (_with_partition(line, partition) for line in read_requests(_lines(part, options)))
        except ConfigurationError as error:
            raise ConfigurationError(f"partition {partition}: {error.message}") from error
        except InputError as error:  # its row numbers are those of this partition's table
            source = f"partition {partition}: {error.source}"
            raise InputError(source, error.problems, more=error.more) from error


def _with_partition(line: Any, partition: str) -> Any:
    if not isinstance(line, Mapping) or not isinstance(line.get("custom_id"), str):
        return line  # validation reports it, with its line
    return {**line, "custom_id": f"{quote(partition, safe='')}/{line['custom_id']}"}


def split_id(custom_id: str) -> tuple[str, str]:
    """The partition and the user's own id, from a custom_id that `request_lines` has made."""
    partition, _, own = custom_id.partition("/")
    return unquote(partition), own


def run_partitions(context: Any) -> tuple[str, ...]:
    """The partition keys of a run; none if its assets have no partitions."""
    if context.has_partition_key or context.has_partition_key_range:
        return tuple(context.partition_keys)
    return ()


def span(partitions: Sequence[str]) -> list[str]:
    """Partition keys in short: the only one, or the first and the last."""
    return [f"{partitions[0]}~{partitions[-1]}"] if len(partitions) > 1 else list(partitions)
