"""The built wheel, in an environment that has neither Airflow nor Dagster nor this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).with_name("uv")

pytestmark = pytest.mark.deployment

JOB = """
import sys
assert "airflow" not in sys.modules and "dagster" not in sys.modules
import anybatch
from anybatch import Outcome, build_requests, run_job

rows = [{"id": f"r{n}", "text": f"hello {n}"} for n in range(20)]
requests = build_requests(rows, "Say: {text}", model="local:echo?delay=0", id_column="id")
report = run_job("local", requests, "out", api_base=f"sqlite:///{sys.argv[1]}/db.sqlite")
assert report.counts[Outcome.SUCCEEDED] == 20, report
joined = list(anybatch.join_results(rows, "out/results.jsonl", id_column="id"))
assert [row["outcome"] for row in joined] == ["succeeded"] * 20
print(anybatch.__file__)
for name in ("core", "tests", "examples", "benchmarks"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is importable")
"""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=os.environ | env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target, cwd=ROOT)
    return next(target.glob("anybatch-*.whl"))


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "anybatch", "anybatch_airflow", "anybatch_dagster",
    }  # fmt: skip
    for package in ("anybatch", "anybatch_airflow", "anybatch_dagster"):
        assert f"{package}/py.typed" in names
    points = (
        zipfile.ZipFile(wheel)
        .read(next(name for name in names if name.endswith("entry_points.txt")))
        .decode()
    )
    assert "[apache_airflow_provider]" in points
    assert "anybatch = anybatch.cli:main" in points


def test_the_core_works_alone(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    run(
        UV,
        "pip",
        "install",
        "--system-certs",
        "--python",
        python,
        "-c",
        ROOT / "constraints.txt",
        wheel,
        cwd=tmp_path,
    )
    told = run(python, "-c", JOB, str(tmp_path), cwd=tmp_path, HOME=str(tmp_path))
    assert str(venv) in told
    version = run(venv / "bin" / "anybatch", "--version", cwd=tmp_path, HOME=str(tmp_path))
    assert version.startswith("anybatch ")
    check = "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) for n in ('airflow', 'dagster')))"
    run(python, "-c", check, cwd=tmp_path)
