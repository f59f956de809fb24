"""What is handed over as request lines: flattened one by one, or refused by name before anything is sent."""

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
_PROMPT = "give `prompt`, which makes a request of each row (in plain Python anybatch.build_requests)"
_JSON = ('{"', '[{"')
# In bytes, on Linux and macOS; to open a longer one is an error that explains nothing.
_LONGEST_NAME, _LONGEST_PATH = 255, 4096


def check_path(path: UPath) -> None:
    """Refuse what cannot be the path of request lines: a table's, and a text that holds the requests."""
    text = str(path)
    if local_path(path) is not None and (text.startswith(_JSON) or _is_too_long(path)):
        # The text itself is not named: it may hold all that is asked.
        raise ConfigurationError(f"input: a path, not a text of {len(text)} characters; write it to a file")
    if path.suffix.lower() in TABLES:
        raise ConfigurationError(f"{path} is a table, not request lines: {_PROMPT}")


def batch_file(given: object) -> Path:
    """The local file that is to be a single batch."""
    if not isinstance(given, str | os.PathLike):
        raise ConfigurationError(
            f"input_file_path: the path of a JSONL file, not {describe(given)}; run_job takes requests"
        )
    check_path(open_path(given))
    return Path(given)


def _is_too_long(path: UPath) -> bool:
    return len(os.fsencode(str(path))) >= _LONGEST_PATH or any(
        len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts
    )


def iter_requests(given: Any) -> Iterator[Any]:
    """Request lines one by one, also out of lists and iterators of them.

    What is no request comes out as it is: whoever counts them refuses it by its place, with `no_request`.
    Raises ConfigurationError for a whole that cannot hold requests.
    """
    if is_frame(given):
        raise ConfigurationError(f"{describe(given)} is a table, not request lines: {_PROMPT}")
    if not is_iterable_of_rows(given):
        raise ConfigurationError(
            f"request lines are a path or an iterable of mappings, not {describe(given)}{advise(given)}"
        )
    return flatten(given, lambda _item, _name: None, "the requests")


def read_requests(given: Any) -> Iterator[Any]:
    """As `iter_requests`, or the lines of a file of them, where each is an object."""
    if not is_path(given):
        return iter_requests(given)
    path = open_path(given)
    check_path(path)
    return read_jsonl(path)


def no_request(item: Any) -> str | None:
    """Why an item is no request line; None where it may be one."""
    if isinstance(item, Mapping):
        return None
    if is_frame(item):
        return f"is {describe(item)}, not a mapping: a table, {_PROMPT}"
    return f"is {describe(item)}, not a mapping{advise(item)}"
