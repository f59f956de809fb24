"""A package that is not part of this repository brings a provider, and tests it in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anybatch.testing import serve
from tests.acme import ENDS_AT_ONCE, AcmeFake
from tests.packages import ROOT, write_package


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write_package(tmp_path)
    return tmp_path


def run(package: Path, *words: str, **env: str) -> str:
    given = os.environ | {"PYTHONPATH": str(package), "ACME_API_KEY": "test-key"} | env
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=package, env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_passes_the_suite_for_providers(package: Path) -> None:
    shutil.copyfile(ROOT / "tests" / "acme.py", package / "test_acme.py")
    (package / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    out = run(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "test_acme.py")
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None
    assert int(passed[1]) >= 35, out


def test_a_job_through_the_command_line(package: Path) -> None:
    fake = AcmeFake(ENDS_AT_ONCE, team="blue")
    with (package / "in.jsonl").open("w") as file:
        for number in range(5):
            body = {"model": "m", "messages": [{"role": "user", "content": f"say {number}"}]}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    with serve(fake) as url:
        program = "from anybatch.cli import main; raise SystemExit(main())"
        words = ("run", "in.jsonl", "out", "--provider", "acme", "--settings", "team=blue")
        run(package, "-c", program, *words, ACME_BASE_URL=url)
    lines = [json.loads(raw) for raw in (package / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["succeeded"] * 5
    assert lines[3]["response"]["body"]["choices"][0]["message"]["content"] == "ACME say 3"
    assert len(fake.batch_ids) == 1
