"""Attempts as processes: started, watched, stopped and killed by a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.exactly_once import child
from tests.exactly_once.stage import LOOKS, POLL, ROWS

if TYPE_CHECKING:
    from anybatch import Job
    from tests.exactly_once.stage import Stage


class Forge:
    """Where attempts come from: one at a time; two forges for two at once."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, child.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def start(self, stage: Stage, job: Job, **order: Any) -> int:
        """Begin an attempt at the job; its process id. `at` and `how`: where to stop or kill itself."""
        order = {
            "provider": stage.name,
            "key": stage.key,
            "api_base": stage.api_base,
            "root": f"{stage.home}/",
            "looks": LOOKS,
            "poll": POLL,
            "rows": ROWS // stage.shards,
            "verb": "run",
            "job": {"input": str(job.input), "output": str(job.output), "lease": job.lease,
                    "on_orphan": job.on_orphan, "max_rounds": job.max_rounds},
            **order,
        }  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._heard())

    def ended(self) -> str:
        """How the attempt ended, once it has: an exit status, or the name of a signal; or "stopped"."""
        return str(self._heard())

    def run(self, stage: Stage, job: Job, **order: Any) -> str:
        self.start(stage, job, **order)
        return self.ended()

    def kill(self, process: int) -> None:
        os.kill(process, signal.SIGKILL)
        assert self.ended() == "SIGKILL"

    def points(self, stage: Stage, job: Job) -> list[str]:
        """What an undisturbed attempt passes."""
        report = stage.home / "points"
        assert self.run(stage, job, report=str(report)) == "0"
        return report.read_text().splitlines()

    def _heard(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the forge has died"
        return json.loads(line)


def fresh(home: Path, name: str) -> Path:
    folder = home / name
    folder.mkdir()
    return folder
