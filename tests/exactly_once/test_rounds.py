"""Rounds of re-submission under kills and rivals: each row is answered once, by the batch of one round.

The first round's batches expire with some rows answered; the rest of them is one more batch.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from anybatch import InputChangedError, Job
from anybatch.errors import AnyBatchError, LedgerConflictError
from tests.exactly_once.forge import Forge, fresh
from tests.exactly_once.stage import FINDABLE, Stage
from tests.exactly_once.test_connections import GIVES_UP
from tests.exactly_once.test_rivals import together
from tests.fakes.faults import ResetAfter, ResetBefore
from tests.fakes.provider import Auto, FakeProvider

# Format, shards, rows of each that are answered at first, the batches' sizes, and the quick run's stride.
SWEEPS = [("openai", 1, 2, [6, 4], 11), ("openai", 3, 1, [2, 2, 2, 2, 1], 17), ("mistral", 1, 4, [6, 2], 17)]


def job_of(stage: Stage, **more: object) -> Job:
    return stage.job(max_rounds=2, **more)


# --- killed ------------------------------------------------------------------------------------------------


def sweep(forge: Forge, name: str, shards: int, done: int, sizes: list[int], home: Path, stride: int) -> None:
    """Kill attempts at each `stride`th point, each in a world of its own; let the next attempt finish."""
    with Stage(name, fresh(home, "undisturbed"), shards=shards, done=done) as stage:
        points = forge.points(stage, job_of(stage))
        stage.check_rounds(stage.run(job_of(stage)), sizes, job_of(stage))
    assert len(points) > 60
    for number in range(stride // 2 + 1, len(points) + 1, stride):
        with Stage(name, fresh(home, f"killed-{number}"), shards=shards, done=done) as stage:
            assert forge.run(stage, job_of(stage), at=number) == "SIGKILL", points[number - 1]
            try:
                stage.check_rounds(stage.run(job_of(stage)), sizes, job_of(stage))
            except AssertionError as error:
                error.add_note(f"killed before point {number}: {points[number - 1]}")
                raise


@pytest.mark.parametrize(("name", "shards", "done", "sizes", "stride"), SWEEPS)
def test_killed_between_writes(
    forge: Forge, name: str, shards: int, done: int, sizes: list[int], stride: int, tmp_path: Path
) -> None:
    sweep(forge, name, shards, done, sizes, tmp_path, stride)


@pytest.mark.deployment
@pytest.mark.parametrize(("name", "shards", "done", "sizes"), [one[:4] for one in SWEEPS])
def test_killed_between_any_two_writes(
    forge: Forge, name: str, shards: int, done: int, sizes: list[int], tmp_path: Path
) -> None:
    sweep(forge, name, shards, done, sizes, tmp_path, 1)


# The requests of the second round, and the one that tells what goes into it: (method, path, how many before).
REQUESTS = {
    "read the first round": ("GET", "/v1/files/[^/]+/content", 0),
    "upload": ("POST", "/v1/files", 1),
    "create": ("POST", "/v1/(batches|batch/jobs)", 1),
    "read the second round": ("GET", "/v1/files/[^/]+/content", 1),
}


def first_of(stage: Stage, step: str) -> tuple[str, str, int]:
    """An expired batch of OpenAI has two files, one of Mistral's none but the answers."""
    method, path, skip = REQUESTS[step]
    return method, path, skip + (step == "read the second round" and stage.name == "openai")


@pytest.mark.parametrize("handled", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", REQUESTS)
@pytest.mark.parametrize("name", FINDABLE)
def test_killed_while_a_request_is_out(
    forge: Forge, name: str, step: str, handled: bool, tmp_path: Path
) -> None:
    """Before the provider has dealt with the request, and after, when it has said nothing yet."""
    with Stage(name, tmp_path, done=2) as stage:
        method, path, skip = first_of(stage, step)
        hold = stage.server.hold(method, path, handled=handled, skip=skip)
        process = forge.start(stage, job_of(stage))
        hold.wait()
        forge.kill(process)
        if handled or step != "create":
            hold.release()
            stage.check_rounds(stage.run(job_of(stage)), [6, 4], job_of(stage))
            return
        # The create is still under way when the next attempt makes another: the late one is nobody's.
        report = stage.run(job_of(stage))
        hold.release()
        stage.server.wait_for(method, path, count=3)
        assert stage.run(job_of(stage)) == report
        assert (report.ok, report.rounds) == (True, 2)


@pytest.mark.parametrize("fault", [ResetBefore(), ResetAfter()], ids=["before", "after"])
@pytest.mark.parametrize("step", REQUESTS)
@pytest.mark.parametrize("name", FINDABLE)
def test_an_outage_in_a_later_round(
    name: str, step: str, fault: ResetBefore | ResetAfter, tmp_path: Path
) -> None:
    """One request is never answered for as long as the attempt tries; the next attempt makes it good."""
    with Stage(name, tmp_path, done=2) as stage:
        method, path, skip = first_of(stage, step)
        stage.server.fail(method, path, fault, times=1000, skip=skip)
        with stage.client(retry=GIVES_UP) as client:
            if step == "create" and isinstance(fault, ResetAfter):  # the batch exists, and is found
                client.run(job_of(stage), timeout=30)
            else:
                with pytest.raises(AnyBatchError):
                    client.run(job_of(stage), timeout=30)
        stage.server.clear_faults()
        stage.check_rounds(stage.run(job_of(stage)), [6, 4], job_of(stage))


# --- rivals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", FINDABLE)
def test_at_once_from_the_beginning(name: str, shards: int, tmp_path: Path) -> None:
    sizes = [6, 4] if shards == 1 else [2, 2, 2, 2, 1]
    for number in range(2):
        with Stage(name, fresh(tmp_path, str(number)), done=2 if shards == 1 else 1, shards=shards) as stage:
            job = job_of(stage, lease=60)
            first, *others = together(stage, job, 3, lambda: 0.0)
            assert all(report == first for report in others)
            stage.check_rounds(first, sizes, job)


@pytest.mark.parametrize("name", FINDABLE)
def test_both_resume_at_once(name: str, tmp_path: Path) -> None:
    """Both have read the results before either opens the round: one opens it, both go on with its batch."""
    for number in range(3):
        with Stage(name, fresh(tmp_path, str(number)), done=2) as stage:
            job = job_of(stage, lease=60)
            with stage.client() as client:
                (batch,) = client.submit(job)
                client.wait(batch.id)
            stage.fake.auto = None
            barrier = threading.Barrier(2)

            def resume(
                stage: Stage = stage, job: Job = job, barrier: threading.Barrier = barrier
            ) -> list[str]:
                with stage.client() as client:
                    barrier.wait()
                    return [batch.id for batch in client.resume(job)]

            with ThreadPoolExecutor(2) as threads:
                one, two = [future.result(30) for future in [threads.submit(resume) for _ in range(2)]]
            assert one == two == stage.live()
            stage.finish()
            stage.check_rounds(stage.run(job), [6, 4], job)


def test_a_rival_opens_the_round_while_one_reads_the_results(tmp_path: Path) -> None:
    with Stage("openai", tmp_path, done=2) as stage, ThreadPoolExecutor(1) as threads:
        job = job_of(stage, lease=60)
        hold = stage.server.hold("GET", "/v1/files/[^/]+/content", handled=True)
        slow = threads.submit(stage.run, job)
        hold.wait()
        quick = stage.run(job)
        hold.release()
        assert slow.result(20) == quick
        stage.check_rounds(quick, [6, 4], job)


@pytest.mark.parametrize("last", ["open", "landed"])
def test_a_rival_opens_two_rounds_while_one_reads_the_results(tmp_path: Path, last: str) -> None:
    """What the first round left is gone by the time it is needed; both go on with the last round."""
    with Stage("openai", tmp_path, done=2) as stage, ThreadPoolExecutor(1) as threads:
        end = stage.fake.auto.end  # type: ignore[union-attr]
        stage.fake.auto = Auto(looks=1, end=partial(_expire_twice, end))
        job = stage.job(max_rounds=3, lease=60)
        # Two files of the first round, and then that of the second one.
        hold = stage.server.hold("GET", "/v1/files/[^/]+/content", handled=True, skip=2)
        slow = threads.submit(stage.run, job)
        hold.wait()
        if last == "landed":
            quick = stage.run(job)
            hold.release()
        else:
            stage.fake.auto = None
            with stage.client() as client:
                client.resume(job)
            hold.release()
            stage.server.wait_for("GET", f"{stage.jobs}/[^/]+", count=6)
            stage.finish()
            quick = stage.run(job)
        assert slow.result(20) == quick
        stage.check_rounds(quick, [6, 4, 3], job)


def _expire_twice(end: Callable[[FakeProvider, str], object], fake: FakeProvider, batch_id: str) -> object:
    """The second round's batch expires as well, after one row."""
    if (fake.batches[batch_id].metadata or {}).get("anybatch_round") == "2":
        return fake.expire(batch_id, done=1)
    return end(fake, batch_id)


def test_a_rival_collects_while_one_opens_the_round(tmp_path: Path) -> None:
    """Who wants one round only has landed; whoever wants two finds that, and has one more made."""
    with Stage("openai", tmp_path, done=2) as stage, ThreadPoolExecutor(1) as threads:
        hold = stage.server.hold("POST", "/v1/files", handled=True, skip=1)
        slow = threads.submit(stage.run, job_of(stage))
        hold.wait()
        with stage.client() as client:
            report = client.collect(stage.job())  # of the round that was opened nothing has been created
        assert (report.rounds, report.counts["succeeded"]) == (2, 2)  # type: ignore[index]
        hold.release()
        with pytest.raises(LedgerConflictError, match="another attempt has landed job"):
            slow.result(20)
        assert len(stage.batches()) == 1
        assert stage.run(stage.job(max_rounds=3)).ok


# --- the place, and the input ----------------------------------------------------------------------------


def test_an_object_store(tmp_path: Path) -> None:
    MemoryFileSystem.store.clear()
    for name in ("openai", "mistral"):
        with Stage(name, fresh(tmp_path, name), done=2) as stage:
            job = job_of(stage, output=f"memory://rounds/{name}")
            stage.check_rounds(stage.run(job), [6, 4], job)


def test_an_object_store_as_input(tmp_path: Path) -> None:
    """Its address is on record, so a later round can be made from there."""
    with Stage("openai", tmp_path, done=2) as stage:
        job = job_of(stage, input="memory://inputs/in.jsonl", output="memory://rounds/in-store")
        source = stage.job(output="memory://inputs").folder / "in.jsonl"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(stage.input.read_bytes())
        with stage.client() as client:
            (batch,) = client.submit(job)
            client.wait(batch.id)
            resumed = job_of(stage, input=(), output=job.output)
            (second,) = client.resume(resumed)
            assert second.id != batch.id
        stage.check_rounds(stage.run(job), [6, 4], job)


@pytest.mark.parametrize(
    ("path", "noted"),
    [
        ("s3://bucket/in.jsonl", "s3://bucket/in.jsonl"),
        ("https://host/in.jsonl?signature=abc", None),
        ("https://user:secret@host/in.jsonl", None),
        ("https://user@host/in.jsonl", None),
        ("ftp://user:secret@host/in.jsonl", None),
        ("ftp://host/in.jsonl", "ftp://host/in.jsonl"),
        ("simplecache::https://host/in.jsonl?signature=abc", None),
        ("s3://connection@bucket/in.jsonl", "s3://connection@bucket/in.jsonl"),
        ("s3://bucket/me@home/in?.jsonl", "s3://bucket/me@home/in?.jsonl"),
        ("/data/a@b/what?.jsonl", "/data/a@b/what?.jsonl"),
        ([{"custom_id": "1"}], None),
    ],
)
def test_what_the_ledger_says_of_the_input(path: object, noted: str | None) -> None:
    from anybatch.jobs.inputs import input_text

    assert input_text(path) == noted  # type: ignore[arg-type]


def test_an_address_that_only_the_path_object_can_open(tmp_path: Path) -> None:
    """Airflow's, of a connection: without that object it is not here, and with it the job goes on."""
    with Stage("openai", tmp_path, ends=False) as stage:
        with stage.client() as client:
            (batch,) = client.submit(stage.job())
            stage.fake.cancel_now(batch.id, done=2)
            path = tmp_path / "out" / "job.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"input": "s3://me@bucket/in.jsonl"}))
            with pytest.raises(InputChangedError, match="could not be submitted again"):
                client.resume(stage.job(input=()))
            client.submit(stage.job())
        stage.finish()
        stage.check_rounds(stage.run(), [6, 4])


def test_a_restart_needs_the_input(tmp_path: Path) -> None:
    with Stage("openai", tmp_path, ends=False) as stage:
        with stage.client() as client:
            (batch,) = client.submit(stage.job())
            stage.input.unlink()
            with pytest.raises(AnyBatchError, match="restart='again': there is no input"):
                client.submit(stage.job(restart="again"))
        assert stage.live() == [batch.id]


def test_an_input_that_changes_while_rows_are_chosen(tmp_path: Path) -> None:
    """Nothing is opened, so the job can be collected, or go on once the input is back."""
    with Stage("openai", tmp_path, done=2) as stage:
        hold = stage.server.hold("GET", "/v1/files/[^/]+/content", handled=True)
        had = stage.input.read_bytes()
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(stage.run, job_of(stage))
            hold.wait()
            stage.input.write_bytes(had[:-20])
            hold.release()
            with pytest.raises(InputChangedError, match="could not be submitted again"):
                running.result(20)
        stage.input.write_bytes(had)
        stage.check_rounds(stage.run(job_of(stage)), [6, 4], job_of(stage))
