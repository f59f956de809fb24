"""A package that is not part of this repository: the provider of docs/providers.md, as if installed."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 120


def write_package(folder: Path) -> None:
    """The module `acme_batches`, and the metadata of its distribution."""
    text = (ROOT / "docs" / "providers.md").read_text()
    sources = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    source = next(one for one in sources if "class Acme(Provider)" in one)
    assert len(source.splitlines()) <= MOST_LINES
    (folder / "acme_batches.py").write_text(source)
    metadata = folder / "acme_batches-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-batches\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[anybatch.providers]\nacme = acme_batches:Acme\n")
