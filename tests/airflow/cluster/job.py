"""One run of a DAG with one job, and the provider of its own that it talks to."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import psutil

from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import FakeBatch, State
from tests.fakes.server import FakeServer

from .cluster import KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from .cluster import Cluster

ROWS = [f"row-{number}" for number in range(5)]
GONE = (State.CANCELLING, State.CANCELLED)


class Task(NamedTuple):
    """A task instance, as the metadata database has it."""

    state: str | None
    tries: int
    pid: int | None
    trigger: int | None
    triggerer: str | None


class Job:
    """While the context is open the provider is there; `start` begins the run."""

    def __init__(self, cluster: Cluster, dag_id: str, name: str) -> None:
        self.cluster = cluster
        self.dag_id = dag_id
        self.run_id = f"{dag_id}-{name}"
        self.fake = OpenAIFake(key=KEY)
        self.server = FakeServer(self.fake)
        self.folder = cluster.output / self.run_id

    def __enter__(self) -> Self:
        self.server.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.__exit__(*error)

    # --- what a person does ------------------------------------------------------------------------------

    def start(self) -> None:
        self.cluster.trigger(self.dag_id, self.run_id, {"api_base": self.server.api_base})

    def clear(self) -> None:
        body = {"dry_run": False, "dag_run_id": self.run_id, "task_ids": ["job"], "only_failed": False}
        self.cluster.api("POST", f"/api/v2/dags/{self.dag_id}/clearTaskInstances", body)

    def mark(self, state: str) -> None:
        self.cluster.api("PATCH", f"{self._run}/taskInstances/job", {"new_state": state})

    def mark_run(self, state: str) -> None:
        self.cluster.api("PATCH", self._run, {"state": state})

    def age(self, hours: int) -> None:
        """Let the run have started that much earlier."""
        self.cluster.query(
            "UPDATE dag_run SET start_date = start_date - make_interval(hours => %s) "
            "WHERE dag_id = %s AND run_id = %s RETURNING id",
            hours,
            self.dag_id,
            self.run_id,
        )

    @property
    def _run(self) -> str:
        return f"/api/v2/dags/{self.dag_id}/dagRuns/{self.run_id}"

    # --- what Airflow says -------------------------------------------------------------------------------

    @property
    def task(self) -> Task:
        rows = self.cluster.query(
            "SELECT ti.state, ti.try_number, ti.pid, ti.trigger_id, job.hostname FROM task_instance ti "
            "LEFT JOIN trigger ON trigger.id = ti.trigger_id LEFT JOIN job ON job.id = trigger.triggerer_id "
            "WHERE ti.dag_id = %s AND ti.run_id = %s AND ti.task_id = 'job'",
            self.dag_id,
            self.run_id,
        )
        return Task(*rows[0]) if rows else Task(None, 0, None, None, None)

    def log(self) -> str:
        """All that attempts and triggers of this run have logged."""
        folder = self.cluster.logs / f"dag_id={self.dag_id}" / f"run_id={self.run_id}"
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(folder.rglob("*.log*"))
        )

    def process(self) -> psutil.Process:
        """The process that executes the task now; its parent supervises it."""
        pid = self.task.pid
        assert pid is not None
        return psutil.Process(pid)

    def looks(self) -> int:
        """How often somebody has asked how the batch stands."""
        return self.server.count("GET", "/v1/batches.*")

    # --- waiting -----------------------------------------------------------------------------------------

    def until(self, what: str, done: Callable[[], bool], timeout: float = 180) -> None:
        self.cluster.until(f"{self.run_id}: {what}", done, timeout, self.story)

    def until_on_the_way(self, what: str, done: Callable[[], bool], timeout: float) -> None:
        """The same, for what cannot come any more once the task has failed."""

        def checked() -> bool:
            if done():
                return True
            assert self.task.state != "failed", f"{self.run_id}: not any more: {what}\n{self.story()}"
            return False

        self.until(what, checked, timeout)

    def until_state(self, *states: str, timeout: float = 180) -> Task:
        what = f"the task is {' or '.join(states)}"
        self.until_on_the_way(what, lambda: self.task.state in states, timeout)
        return self.task

    def until_watched(self, tries: int = 1, timeout: float = 180) -> Task:
        """Return when this attempt is deferred and its trigger has looked at a batch."""
        self.until_on_the_way(
            f"attempt {tries} is deferred",
            lambda: (self.task.state, self.task.tries) == ("deferred", tries) and bool(self.task.triggerer),
            timeout,
        )
        self.until_looked_at(self.looks())
        return self.task

    def until_looked_at(self, seen: int) -> None:
        """Return when there have been more looks at the batch than those."""
        self.until("the trigger looks at the batch", lambda: self.looks() > seen, 60)

    def until_created(self, count: int = 1, timeout: float = 180) -> FakeBatch:
        """The newest batch, once so many have been created."""
        what = f"{count} batches are created"
        self.until_on_the_way(what, lambda: len(self.fake.batches) >= count, timeout)
        return self.fake.last

    def until_cancelled(self, batch: FakeBatch) -> None:
        self.until("the batch is cancelled", lambda: batch.state in GONE, 120)

    def until_retried(self, timeout: float = 180) -> None:
        """Return when Airflow has missed the first attempt and started the second."""
        runs = ("running", 2)
        self.until_on_the_way("a second attempt runs", lambda: self.task[:2] == runs, timeout)

    # --- the account ---------------------------------------------------------------------------------------

    @property
    def ledger_ids(self) -> set[str]:
        """The batches that the job's own records name."""
        ids: set[str] = set()
        for name, key, field in (("job.json", "shards", "batch_id"), ("report.json", "batches", "id")):
            if (self.folder / name).exists():
                ids.update(one[field] for one in json.loads((self.folder / name).read_text())[key])
        return ids

    def check_no_orphan(self) -> None:
        """No batch is paid for that the job does not know of."""
        live = {batch.id for batch in self.fake.batches.values() if batch.is_live}
        assert live <= self.ledger_ids, self.story()

    def check(
        self,
        *,
        batches: int = 1,
        state: str = "success",
        tries: int | None = None,
        outcomes: Mapping[str, int] | None = None,
    ) -> None:
        """The task is over, that many batches were created, and every row is in the results once."""
        task = self.task
        assert task.state == state, self.story()
        assert tries in (None, task.tries), self.story()
        assert len(self.fake.batches) == batches, self.story()
        self.check_no_orphan()
        rows = [json.loads(line) for line in (self.folder / "results.jsonl").read_text().splitlines()]
        assert [row["custom_id"] for row in rows] == ROWS
        found = Counter(row["outcome"] for row in rows)
        assert found == (outcomes or {"succeeded": len(ROWS)}), self.story()
        report = json.loads((self.folder / "report.json").read_text())
        assert report["rows"] == len(ROWS)
        assert {name: count for name, count in report["counts"].items() if count} == found

    def finish(self, batch: FakeBatch, *, batches: int = 1, tries: int | None = None) -> None:
        """Let the provider complete a batch, and see the task through."""
        self.fake.finish(batch.id)
        self.until_state("success")
        self.check(batches=batches, tries=tries)

    def story(self) -> str:
        """What happened, for a person to read: the provider's record, the task, and its log."""
        begun = self.server.calls[0].at if self.server.calls else time.time()
        calls = [f"{call.at - begun:6.1f} {call} {call.fault or ''}" for call in self.server.calls]
        batches = [f"{one.id} {one.state} {one.metadata}" for one in self.fake.batches.values()]
        told = [_event(line) for line in self.log().splitlines()]
        return "\n".join([str(self.task), *batches, *calls[-40:], *filter(None, told)])


@contextlib.contextmanager
def started(cluster: Cluster, dag_id: str, name: str) -> Iterator[Job]:
    """A job whose run has been triggered."""
    with Job(cluster, dag_id, name) as job:
        job.start()
        yield job


def _event(line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    causes = [f"{each['exc_type']}: {each['exc_value']}" for each in entry.get("error_detail") or ()]
    told = (str(entry.get("timestamp"))[11:23], str(entry.get("level")), str(entry["event"]))
    return "  ".join([*told, *causes])
