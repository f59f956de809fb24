"""Make the golden folders anew: `python -m tests.golden.record`, only when the ledger's version has changed.

For each wire format a job of six rows in two batches is submitted, one batch expires, its rows go again, and
the folder is kept as it is while the second round runs. Beside it lie the provider's answers from then on,
and what landed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from tests.conformance.world import FORMATS, RemoteWorld, landed, row_ids
from tests.fakes.server import Reply, Request

HERE = Path(__file__).parent
JOB = "golden job"
COUNT = 6


def record(name: str, target: Path) -> None:
    """One wire format's folder: `before/`, `answers.json` and `after/`."""
    answers: list[dict[str, object]] = []
    with RemoteWorld(name, clock=lambda: 1_800_000_000.0) as world, tempfile.TemporaryDirectory() as scratch:
        fake = world.fake

        def serve(request: Request) -> Reply:
            reply = fake(request)
            answer = {"method": request.method, "path": request.path, "status": reply.status}
            answers.append(answer | {"body": reply.body.decode()})
            return reply

        world.server.app = serve
        given = world.job(Path(scratch), count=COUNT, shard_requests=4, max_rounds=2)
        job = replace(given, id=JOB)
        driver = world.open("sync")
        first, second = driver.submit(job)
        fake.finish(first.id, failed=1)
        fake.expire(second.id, done=1)
        (again,) = (batch for batch in driver.resume(job) if batch.id not in (first.id, second.id))
        shutil.copytree(job.folder.path, target / "before", ignore=shutil.ignore_patterns(".lock"))
        answers.clear()
        fake.finish(again.id)
        report = driver.collect(job)
        landed(job, report, row_ids(COUNT))
        shutil.copytree(job.folder.path, target / "after", ignore=shutil.ignore_patterns(".lock"))
        for path in target.rglob("*.json*"):  # where it was made is nobody's business
            path.write_text(path.read_text().replace(scratch, "/golden"))
    (target / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")


def main() -> None:
    for name in FORMATS:
        target = HERE / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        record(name, target)
        print(name, sorted(path.name for path in (target / "before").iterdir()))


if __name__ == "__main__":
    main()
