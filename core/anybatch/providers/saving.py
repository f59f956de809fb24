"""Helpers for a provider's `download`: save results, however they are served, as files of JSON lines.

Each helper streams: at most one page of results is in memory, and a body of any size goes through a file.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import orjson

from ..errors import NotFoundError
from ..flow import Flow, do, download
from .splitting import split_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

# The most pages of one batch's results: at 100 rows a page, this is ten times the largest batch.
_MOST_PAGES = 20_000


class FileGoneError(NotFoundError):
    """A result file that the batch names is gone; `paths` are the files that could be downloaded."""

    def __init__(self, error: NotFoundError, paths: list[Path]) -> None:
        super().__init__(
            error.message, code=error.code, status_code=error.status_code, request_id=error.request_id
        )
        self.paths = paths


def result_file(folder: Path, batch_id: str, number: int = 0) -> Path:
    """Return the path of a file for a batch's results.

    Ids that are too long for a file name are cut, and a hash keeps the name unique: LiteLLM's ids all begin
    and end alike.

    Args:
        folder: The folder of the file.
        batch_id: The id of the batch.
        number: Which of the batch's files this is, from 0.

    Returns:
        The path.
    """
    name = re.sub(r"[^\w=.-]", "_", batch_id)
    if len(name) > 100:
        name = f"{name[:80]}~{hashlib.sha256(batch_id.encode()).hexdigest()[:16]}"
    return folder / f"{name}.{number}.jsonl"


def download_files(folder: Path, batch_id: str, files: Iterable[str | httpx.Request]) -> Flow[list[Path]]:
    """Download files of JSON lines.

    Args:
        folder: The folder for them.
        batch_id: The id of the batch.
        files: The address of each, or the request for it.

    Returns:
        The paths of the downloaded files.

    Raises:
        NotFoundError: A file answers 404. As a FileGoneError it carries the paths of the others.
        APIError: A download failed for another reason.
    """
    paths: list[Path] = []
    gone: NotFoundError | None = None
    for number, file in enumerate(files):
        path = result_file(folder, batch_id, number)
        try:
            yield from download(httpx.Request("GET", file) if isinstance(file, str) else file, path)
        except NotFoundError as error:  # still download the other files
            gone = error
            path.unlink(missing_ok=True)
        else:
            paths.append(path)
    if gone is not None:
        raise FileGoneError(gone, paths) from gone
    return paths


def save_pages(
    path: Path, next_page: Callable[[str | None], Flow[tuple[Sequence[Mapping[str, Any]], str | None]]]
) -> Flow[None]:
    """Write the records of all pages to a file, one JSON line each.

    A listing that ends too early yields fewer rows than the provider counts, and is then downloaded again.

    Args:
        path: The file to write.
        next_page: Gets a page by its cursor (None for the first page), and returns its records and the next
            cursor. None, or a cursor that was used before, ends the listing.
    """
    yield from do(partial(path.write_bytes, b""))
    used: set[str | None] = set()
    cursor: str | None = None
    while cursor not in used and len(used) < _MOST_PAGES:
        used.add(cursor)
        records, cursor = yield from next_page(cursor)
        yield from do(partial(save_lines, path, records))
        if cursor is None:
            return


def save_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a file, one JSON line each. It blocks: call it through `do`.

    Args:
        path: The file.
        records: The records.
    """
    with path.open("ab") as file:
        file.writelines(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)


def save_member(path: Path, request: httpx.Request, *member: str) -> Flow[dict[str, Any]]:
    """GET one JSON object of any size, and write the elements of a list in it to a file, one per line.

    Args:
        path: The file to write.
        request: The request for the object.
        member: The path of the list in the object, such as `"response", "results"`.

    Returns:
        The object without the list. If the body breaks off, the file holds the elements before that point.

    Raises:
        ServerError: The answer is not a JSON object.
        APIError: The request failed.
    """
    whole = path.with_suffix(".body")
    try:
        yield from download(request, whole)
        rest: dict[str, Any] = yield from do(partial(split_object, whole, member, path))
        return rest
    finally:
        whole.unlink(missing_ok=True)


def get_without(url: str, *member: str) -> Flow[dict[str, Any]]:
    """GET one JSON object without a list in it, for a batch that carries its results.

    Args:
        url: The address.
        member: The path of the list in the object.

    Returns:
        The object without the list.

    Raises:
        ServerError: The answer is not a JSON object, or breaks off.
        APIError: The request failed.
    """
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        whole = Path(scratch) / "body"
        yield from download(httpx.Request("GET", url), whole)
        rest: dict[str, Any] = yield from do(partial(split_object, whole, member, None))
        return rest
