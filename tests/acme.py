"""The tests that the package of docs/providers.md would bring: a fake of its server, and the suite.

They are copied beside the package and run there; the fake also serves jobs through Airflow and Dagster.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import httpx

from anybatch import BatchStatus
from anybatch.testing import ProviderSuite

PAGE = 2
STATES = {
    BatchStatus.COMPLETED: "done",
    BatchStatus.EXPIRED: "timed_out",
    BatchStatus.CANCELLED: "stopped",
    BatchStatus.FAILED: "refused",
}


ENDS_AT_ONCE = BatchStatus.COMPLETED


class AcmeFake:
    """Acme's server, in memory; with `ends`, jobs end so as soon as they are looked at."""

    def __init__(self, ends: BatchStatus | None = None, *, team: str = "main") -> None:
        self.ends = ends
        self.team = team
        self.jobs: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.key = "test-key"

    @property
    def batch_ids(self) -> list[str]:
        return list(self.jobs)

    def end(self, batch_id: str, status: BatchStatus) -> None:
        job, rows = self.jobs[batch_id], self.rows[batch_id]
        answered = {BatchStatus.COMPLETED: len(rows), BatchStatus.FAILED: 0}.get(status, len(rows) // 2)
        for row in rows[:answered]:
            said = row["input"]["messages"][-1]["content"]
            row["output"] = {"choices": [{"message": {"role": "assistant", "content": f"ACME {said}"}}]}
        job |= {"state": STATES[status], "good": answered}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("authorization") != f"Bearer {self.key}":
            return httpx.Response(401, json={"error": {"message": "no such key"}})
        match request.method, request.url.path.strip("/").split("/")[1:]:
            case "POST", ["jobs"]:
                return self.create(json.loads(request.read()))
            case "GET", ["jobs"]:
                newest_first = list(self.jobs.values())[::-1]
                size = int(request.url.params.get("limit") or 20)
                return self.page("jobs", newest_first, request, size)
            case "GET", ["jobs", job_id] if job_id in self.jobs:
                if self.ends is not None and self.jobs[job_id]["state"] == "waiting":
                    self.end(job_id, self.ends)
                return httpx.Response(200, json=self.jobs[job_id])
            case "POST", ["jobs", job_id, "stop"] if job_id in self.jobs:
                if self.jobs[job_id]["state"] not in ("waiting", "stopping"):
                    return httpx.Response(409, json={"error": {"message": "it has ended"}})
                self.jobs[job_id]["state"] = "stopping"
                return httpx.Response(200, json=self.jobs[job_id])
            case "GET", ["jobs", job_id, "results"] if job_id in self.jobs:
                answered = [
                    {"ref": row["ref"], "output": row["output"]}
                    for row in self.rows[job_id]
                    if "output" in row
                ]
                return self.page("results", answered, request, PAGE)
        return httpx.Response(404, json={"error": {"message": "there is nothing here"}})

    def create(self, body: dict[str, Any]) -> httpx.Response:
        assert body["team"] == self.team
        job_id = f"job-{len(self.jobs) + 1}"
        total = len(body["requests"])
        self.rows[job_id] = body["requests"]
        self.jobs[job_id] = {
            "id": job_id, "name": body["name"], "state": "waiting", "created": int(time.time()),
            "total": total, "good": 0, "bad": 0,
        }  # fmt: skip
        return httpx.Response(201, json=self.jobs[job_id])

    def page(
        self, name: str, entries: list[dict[str, Any]], request: httpx.Request, size: int
    ) -> httpx.Response:
        begin = int(request.url.params.get("cursor") or 0)
        here = list(itertools.islice(entries, begin, begin + size))
        onward = str(begin + size) if begin + size < len(entries) else None
        return httpx.Response(200, json={name: here, "next": onward})


class TestAcme(ProviderSuite):
    name = "acme"

    def make_fake(self) -> AcmeFake:
        return AcmeFake()
