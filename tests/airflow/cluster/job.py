"""One run of a DAG with one job, and the provider of its own that it talks to."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import psutil

from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import FakeBatch, State
from tests.fakes.rows import Fate
from tests.fakes.server import FakeServer

from .cluster import KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

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
    """While the context is open the provider is there; `start` begins the run.

    Of a mapped task each index is a job of its own, with a provider of its own: see `start_mapped`.
    """

    def __init__(self, cluster: Cluster, dag_id: str, name: str, *, map_index: int = -1) -> None:
        self.cluster = cluster
        self.dag_id = dag_id
        self.run_id = f"{dag_id}-{name}"
        self.task_id = "job"
        self.map_index = map_index
        self.fake = OpenAIFake(key=KEY)
        self.server = FakeServer(self.fake)
        self.folder = cluster.output / self.run_id
        if map_index >= 0:
            self.folder /= str(map_index)

    def __enter__(self) -> Self:
        self.server.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.__exit__(*error)

    def of(self, task_id: str) -> Job:
        """The same run, seen from another of its tasks."""
        other = copy.copy(self)
        other.task_id = task_id
        return other

    # --- what a person does ------------------------------------------------------------------------------

    def start(self) -> None:
        self.cluster.trigger(self.dag_id, self.run_id, {"api_base": self.server.api_base})

    def clear(self) -> None:
        task = self.task_id if self.map_index < 0 else [self.task_id, self.map_index]
        body = {"dry_run": False, "dag_run_id": self.run_id, "task_ids": [task], "only_failed": False}
        self.cluster.api("POST", f"/api/v2/dags/{self.dag_id}/clearTaskInstances", body)

    def mark(self, state: str) -> None:
        index = "" if self.map_index < 0 else f"/{self.map_index}"
        self.cluster.api("PATCH", f"{self._run}/taskInstances/{self.task_id}{index}", {"new_state": state})

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
            "WHERE ti.dag_id = %s AND ti.run_id = %s AND ti.task_id = %s AND ti.map_index = %s",
            *self._key,
        )
        return Task(*rows[0]) if rows else Task(None, 0, None, None, None)

    @property
    def hosts(self) -> list[str]:
        """The worker that each attempt was on last, the first attempt's first."""
        mine = "WHERE dag_id = %s AND run_id = %s AND task_id = %s AND map_index = %s"
        rows = self.cluster.query(
            f"SELECT try_number, hostname FROM task_instance_history {mine} "
            f"UNION SELECT try_number, hostname FROM task_instance {mine} ORDER BY try_number",
            *self._key,
            *self._key,
        )
        return [host for _, host in rows]

    @property
    def _key(self) -> tuple[str, str, str, int]:
        return self.dag_id, self.run_id, self.task_id, self.map_index

    def log(self) -> str:
        """All that attempts and triggers of this run have logged; of a mapped task, those of this index."""
        folder = self.cluster.logs / f"dag_id={self.dag_id}" / f"run_id={self.run_id}"
        if self.map_index >= 0:
            folder = folder / f"task_id={self.task_id}" / f"map_index={self.map_index}"
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(folder.rglob("*.log*"))
        )

    def processes(self) -> tuple[psutil.Process, psutil.Process]:
        """The process that executes the task now, and the one that supervises it."""
        found: list[psutil.Process | None] = []

        def there() -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(self.task.pid or 0)
                found[:] = process, process.parent()
            return len(found) == 2 and None not in found

        self.until("its processes run", there, 30)
        process, supervisor = found
        assert process is not None
        assert supervisor is not None
        return process, supervisor

    def looks(self) -> int:
        """How often somebody has asked how the batch stands."""
        return self.server.count("GET", "/v1/batches.*")

    @property
    def kept(self) -> int:
        """How often a trigger has been told to end and has left the batch alone."""
        return self.log().count("leaving its batches running")

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

    def until_waits(self, tries: int) -> None:
        """Return when this attempt holds a worker slot and has looked at a batch."""
        self.until(f"attempt {tries} runs", lambda: self.task[:2] == ("running", tries))
        self.until_looked_at(self.looks())

    def until_kept(self, seen: int) -> None:
        """Return when one more trigger has been told to end and has left the batch alone."""
        self.until("the batch is left running", lambda: self.kept > seen, 60)

    def until_looked_at(self, seen: int) -> None:
        """Return when there have been more looks at the batch than those."""
        self.until("the trigger looks at the batch", lambda: self.looks() > seen, 60)

    def until_created(self, count: int = 1, timeout: float = 180) -> FakeBatch:
        """The newest batch, once so many have been created."""
        what = f"{count} batches are created"
        self.until_on_the_way(what, lambda: len(self.fake.batches) >= count, timeout)
        return self.fake.last

    def until_over(self, state: str) -> None:
        """Return when the run has come to this end."""
        self.until(f"the run is {state}", lambda: self.cluster.run_state(self.dag_id, self.run_id) == state)

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

    @property
    def has_landed(self) -> bool:
        """Whether the job's own record says that its results are there for good."""
        record = self.folder / "job.json"
        return record.exists() and json.loads(record.read_text())["landed_at"] is not None

    def check_no_orphan(self) -> None:
        """No batch is paid for that the job does not know of."""
        live = {batch.id for batch in self.fake.batches.values() if batch.is_live}
        assert live <= self.ledger_ids, self.story()

    def check_record(self, *, batches: int = 1, cancelled: int = 0) -> None:
        """So many batches have been created at the provider, and it was asked to cancel so many of them."""
        assert len(self.fake.batches) == batches, self.story()
        asked = {call.path for call in self.server.find("POST", "/v1/batches/.*/cancel")}
        assert len(asked) == cancelled, self.story()

    def check(
        self,
        *,
        batches: int = 1,
        cancelled: int = 0,
        state: str = "success",
        tries: int | None = None,
        outcomes: Mapping[str, int] | None = None,
    ) -> None:
        """The task is over; so many batches were created and cancelled; every row is in the results once, and
        was paid for once if it succeeded."""
        task = self.task
        assert task.state == state, self.story()
        assert tries in (None, task.tries), self.story()
        self.check_record(batches=batches, cancelled=cancelled)
        self.check_no_orphan()
        rows = [json.loads(line) for line in (self.folder / "results.jsonl").read_text().splitlines()]
        assert [row["custom_id"] for row in rows] == ROWS
        found = Counter(row["outcome"] for row in rows)
        assert found == (outcomes or {"succeeded": len(ROWS)}), self.story()
        assert found["succeeded"] == sum(map(answered, self.fake.batches.values())), self.story()
        report = json.loads((self.folder / "report.json").read_text())
        assert report["rows"] == len(ROWS)
        assert {name: count for name, count in report["counts"].items() if count} == found

    def finish(
        self, batch: FakeBatch, *, batches: int = 1, cancelled: int = 0, tries: int | None = None
    ) -> None:
        """Let the provider complete a batch, and see the task through."""
        self.fake.finish(batch.id)
        self.until_state("success")
        self.check(batches=batches, cancelled=cancelled, tries=tries)

    def finish_rest(self, batch: FakeBatch, *, tries: int) -> None:
        """Let a batch that is being cancelled end with two rows done, and see the task through: they are
        kept, and the rest is submitted again."""
        self.fake.cancel_now(batch.id, done=2)
        rest = self.until_created(2)
        self.finish(rest, batches=2, cancelled=1, tries=tries)
        assert rest.ids == ROWS[2:]

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


def start_mapped(jobs: Sequence[Job]) -> None:
    """One run of a mapped task; each job is an index of it."""
    first = jobs[0]
    conf = {"api_bases": [job.server.api_base for job in jobs]}
    first.cluster.trigger(first.dag_id, first.run_id, conf)


def answered(batch: FakeBatch) -> int:
    """The rows of a batch that are paid for, as its provider has them."""
    return batch.counted(Fate.SUCCEEDED)


def _event(line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    causes = [f"{each['exc_type']}: {each['exc_value']}" for each in entry.get("error_detail") or ()]
    told = (str(entry.get("timestamp"))[11:23], str(entry.get("level")), str(entry["event"]))
    return "  ".join([*told, *causes])
