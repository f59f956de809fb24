"""A package that is not part of this repository brings a provider: the one of docs/providers.md.

It is written to a folder, with the metadata of an installed distribution, and tested by a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 120


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the package, as if it were installed there."""
    text = (ROOT / "docs" / "providers.md").read_text()
    sources = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    source = next(one for one in sources if "class Acme(Provider)" in one)
    assert len(source.splitlines()) <= MOST_LINES
    (tmp_path / "acme_batches.py").write_text(source)
    metadata = tmp_path / "acme_batches-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-batches\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[anybatch.providers]\nacme = acme_batches:Acme\n")
    shutil.copyfile(Path(__file__).with_name("acme_suite.py"), tmp_path / "test_acme.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    return tmp_path


def run(package: Path, *words: str) -> str:
    env = os.environ | {"PYTHONPATH": str(package), "ACME_API_KEY": "test-key"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=package, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_passes_the_suite_for_providers(package: Path) -> None:
    out = run(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "test_acme.py")
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None
    assert int(passed[1]) >= 35, out
