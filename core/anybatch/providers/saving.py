"""What a provider's `download` is made of: results, however they are served, as files of JSON lines.

Each helper streams: a page of results is in memory at most, and a body of any size goes through a file.
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

# Pages of one batch's results that are read at most: of a hundred rows each, ten times the largest batch.
_MOST_PAGES = 20_000


class FileGoneError(NotFoundError):
    """A result file that the batch names is not there; `paths` are those that are."""

    def __init__(self, error: NotFoundError, paths: list[Path]) -> None:
        super().__init__(
            error.message, code=error.code, status_code=error.status_code, request_id=error.request_id
        )
        self.paths = paths


def result_file(folder: Path, batch_id: str, number: int = 0) -> Path:
    """Where a batch's results go.

    LiteLLM's ids are longer than a file's name may be, and begin and end alike.
    """
    name = re.sub(r"[^\w=.-]", "_", batch_id)
    if len(name) > 100:
        name = f"{name[:80]}~{hashlib.sha256(batch_id.encode()).hexdigest()[:16]}"
    return folder / f"{name}.{number}.jsonl"


def download_files(folder: Path, batch_id: str, files: Iterable[str | httpx.Request]) -> Flow[list[Path]]:
    """GET files of JSON lines, by address or by request, each into a file of its own.

    Raises FileGoneError, with the others, where one answers 404.
    """
    paths: list[Path] = []
    gone: NotFoundError | None = None
    for number, file in enumerate(files):
        path = result_file(folder, batch_id, number)
        try:
            yield from download(httpx.Request("GET", file) if isinstance(file, str) else file, path)
        except NotFoundError as error:  # the other file may be there
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

    `next_page` is called with None, then with the cursor that it returned beside the records of the page
    before; None, or a cursor that was used already, ends it. That a listing ends too early shows in the
    counts of the batch: then everything is downloaded again.
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
    """Append records to a file, one JSON line each. It blocks: call it through `do`, or from a generator."""
    with path.open("ab") as file:
        file.writelines(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)


def save_member(path: Path, request: httpx.Request, *member: str) -> Flow[dict[str, Any]]:
    """GET one JSON object of any size, and write the list at `member` of it to a file, one element a line.

    The elements stay as the server wrote them. Returns the object without the list. A body that breaks off in
    the middle gives the elements before that.
    """
    whole = path.with_suffix(".body")
    try:
        yield from download(request, whole)
        rest: dict[str, Any] = yield from do(partial(split_object, whole, member, path))
        return rest
    finally:
        whole.unlink(missing_ok=True)


def get_without(url: str, *member: str) -> Flow[dict[str, Any]]:
    """GET one JSON object without the list at `member`: for a batch that carries its results."""
    with tempfile.TemporaryDirectory(prefix="anybatch-") as scratch:
        whole = Path(scratch) / "body"
        yield from download(httpx.Request("GET", url), whole)
        rest: dict[str, Any] = yield from do(partial(split_object, whole, member, None))
        return rest
