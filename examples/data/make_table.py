"""Make api_operations.csv from the API descriptions that botocore ships.

    pip install botocore==1.44.5
    python make_table.py "$(python -c 'import botocore, os; print(os.path.dirname(botocore.__file__))')"

The same botocore gives the same bytes: services take turns, each giving its next operation in the order of
a hash of the name, so that no service dominates and no random generator is involved.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import html
import itertools
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS = 2400
LONGEST = 400  # characters of description
COLUMNS = ("operation_id", "service", "operation", "description")


def plain(markup: str) -> str:
    """The text of an HTML fragment on one line, cut after the last sentence that still fits."""
    text = markup
    for _ in range(2):  # some services escape their markup once more
        text = re.sub(r"</?(?:p|li|ul|ol|dt|dd|dl|note|important|h\d|br)\b[^>]*>", " ", text)
        text = html.unescape(re.sub(r"<[^>]*>", "", text))
    text = re.sub(r" ([.,;:])(?= |$)", r"\1", " ".join(text.split()))
    if len(text) <= LONGEST:
        return text
    end = max(text.rfind(stop, 0, LONGEST + 1) for stop in (". ", "! ", "? "))
    return text[: end + 1] if end > 0 else text[: text.rfind(" ", 0, LONGEST)] + " …"


def operations(service: Path) -> Iterator[dict[str, str]]:
    """The documented operations of the newest API version in a service's folder."""
    versions = sorted(service.glob("*/service-2.json.gz"))
    if not versions:
        return
    with gzip.open(versions[-1]) as file:
        model = json.load(file)
    name = model["metadata"].get("serviceFullName") or service.name
    for operation, about in model["operations"].items():
        if description := plain(about.get("documentation", "")):
            row = (f"{service.name}.{operation}", name, operation, description)
            yield dict(zip(COLUMNS, row, strict=True))


def by_hash(row: dict[str, str]) -> bytes:
    return hashlib.sha256(row["operation_id"].encode()).digest()


def sample(data: Path) -> list[dict[str, str]]:
    folders = sorted(folder for folder in data.iterdir() if folder.is_dir())
    services = [sorted(operations(folder), key=by_hash) for folder in folders]
    turns = [sorted(filter(None, turn), key=by_hash) for turn in itertools.zip_longest(*services)]
    chosen = list(itertools.islice(itertools.chain.from_iterable(turns), ROWS))
    return sorted(chosen, key=lambda row: row["operation_id"])


def main(botocore: Path) -> None:
    target = Path(__file__).with_name("api_operations.csv")
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows := sample(botocore / "data"))
    print(f"{target.name}: {len(rows)} rows, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
