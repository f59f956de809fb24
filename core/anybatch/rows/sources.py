"""Read request lines from what the user passed, or refuse it with a reason before anything is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..paths import is_path, local_path, open_path
from .readers import read_jsonl
from .shapes import advise, describe, flatten, is_frame, is_iterable_of_rows

if TYPE_CHECKING:
    from upath import UPath

TABLES = (".csv", ".tsv", ".parquet")
_PROMPT = "give `prompt` to build a request from each row (in plain Python: anybatch.build_requests)"
_JSON = ('{"', '[{"')
# In bytes, on Linux and macOS. Opening a longer path raises an error that does not explain itself.
_LONGEST_NAME, _LONGEST_PATH = 255, 4096


def check_path(path: UPath) -> None:
    """Raise ConfigurationError for the path of a table, and for a text that is no path but holds requests."""
    text = str(path)
    if local_path(path) is not None and (text.startswith(_JSON) or _is_too_long(path)):
        # Do not show the text: it may hold all prompts.
        raise ConfigurationError(
            f"input: must be a path, not a text of {len(text)} characters; write the requests to a file"
        )
    if path.suffix.lower() in TABLES:
        raise ConfigurationError(f"{path} is a table, not request lines: {_PROMPT}")


def batch_file(path: object) -> Path:
    """Check the `input_file_path` of a single batch, and return it as a local path."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigurationError(
            f"input_file_path: must be the path of a JSONL file, not {describe(path)}; use run_job for "
            "request objects"
        )
    check_path(open_path(path))
    return Path(path)


def _is_too_long(path: UPath) -> bool:
    return len(os.fsencode(str(path))) >= _LONGEST_PATH or any(
        len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts
    )


def iter_requests(requests: Any) -> Iterator[Any]:
    """Yield request objects one by one, also from nested lists and iterators.

    Items that are no requests are yielded as they are: the caller counts them, and can refuse one by its
    number with `why_no_request`. Raises ConfigurationError for a value that cannot hold requests at all.
    """
    if is_frame(requests):
        raise ConfigurationError(f"{describe(requests)} is a table, not request lines: {_PROMPT}")
    if not is_iterable_of_rows(requests):
        raise ConfigurationError(
            "request lines must be a path or an iterable of mappings, not "
            f"{describe(requests)}{advise(requests)}"
        )
    return flatten(requests, lambda _item, _name: None, "the requests")


def read_requests(requests: Any) -> Iterator[Any]:
    """Yield request objects from an iterable as `iter_requests` does, or from a JSONL file.

    Args:
        requests: A path or fsspec URL of a JSONL file, or an iterable of request objects.

    Returns:
        An iterator of the request objects.

    Raises:
        ConfigurationError: The value cannot hold requests.
        InputError: A line of the file is not a JSON object, or there is no such file. It is raised when the
            iterator gets there.
    """
    if not is_path(requests):
        return iter_requests(requests)
    path = open_path(requests)
    check_path(path)
    return read_jsonl(path)


def why_no_request(item: Any) -> str | None:
    """Return why an item cannot be a request line, or None if it may be one."""
    if isinstance(item, Mapping):
        return None
    if is_frame(item):
        return f"is {describe(item)}, which is a table and not a mapping: {_PROMPT}"
    return f"is {describe(item)}, not a mapping{advise(item)}"
