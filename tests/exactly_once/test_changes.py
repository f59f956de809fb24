"""What else may change between two attempts: the input, the key, the ledger, the batch itself."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from anybatch import Job, Report
from anybatch.errors import (
    AuthenticationError,
    BadRequestError,
    BatchFailedError,
    ConfigurationError,
    InputChangedError,
    JobError,
    LedgerConflictError,
    NotFoundError,
    RateLimitError,
    ServerError,
)
from anybatch.jobs.ledger import Ledger, Step
from anybatch.jobs.options import KeepRequests
from tests.exactly_once.stage import FINDABLE, ROWS, Stage, check_results, requests, write
from tests.exactly_once.test_connections import GIVES_UP
from tests.fakes.faults import ResetAfter, Respond
from tests.fakes.server import FakeServer


@pytest.fixture(params=FINDABLE)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    """One whose batches run until they are told to end."""
    with Stage(request.param, tmp_path, ends=False) as stage:
        yield stage


def submit(stage: Stage, **more: Any) -> str:
    with stage.client(retry=GIVES_UP) as client:
        (batch,) = client.submit(stage.job(**more))
    return batch.id


def finished(stage: Stage, **more: Any) -> Report:
    stage.finish()
    return stage.run(stage.job(**more))


def ledger_of(stage: Stage) -> Ledger:
    ledger = stage.job().ledger()
    assert ledger is not None
    return ledger


def other_input(stage: Stage, rows: int = 3) -> Path:
    return write(stage.home / "other.jsonl", requests(stage.model, rows, say="other"))


# --- the input ---------------------------------------------------------------------------------------


def test_a_changed_input_replaces_a_running_batch(stage: Stage) -> None:
    old = submit(stage)
    other = other_input(stage)
    new = submit(stage, input=other)
    assert stage.live() == [new] != [old]
    stage.check(finished(stage, input=other), stage.job(input=other), created=2, rows=3)


def test_a_changed_input_can_be_refused(stage: Stage) -> None:
    batch_id = submit(stage)
    before = stage.server.count()
    with pytest.raises(InputChangedError, match=rf"{batch_id}.*on_changed='cancel_and_resubmit'"):
        submit(stage, input=other_input(stage), on_changed="fail")
    assert stage.server.count() == before
    stage.check(finished(stage))


@pytest.mark.parametrize("back", [False, True], ids=["new input", "old input again"])
def test_an_input_changed_while_its_create_is_in_doubt(stage: Stage, back: bool) -> None:
    """The create was lost, nobody could be asked: its batch is stopped before another is made."""
    stage.server.fail("POST", stage.jobs, ResetAfter())
    stage.server.fail("GET", stage.jobs, Respond(503), times=2)
    with pytest.raises(ServerError):
        submit(stage)
    assert ledger_of(stage).batch_ids == []
    (old,) = stage.batches()
    other = other_input(stage)
    with pytest.raises(InputChangedError, match="none yet"):
        submit(stage, input=other, on_changed="fail")
    if back:
        assert submit(stage) == old
        stage.check(finished(stage))
        return
    new = submit(stage, input=other)
    assert stage.live() == [new] != [old]
    stage.check(finished(stage, input=other), stage.job(input=other), created=2, rows=3)


def test_there_and_back_again(stage: Stage) -> None:
    """Each change pays anew; the results are those of the last input, and nothing of the others is left."""
    other = other_input(stage)
    ids = [submit(stage), submit(stage, input=other), submit(stage)]
    assert stage.live() == [ids[2]]
    assert len(set(ids)) == 3
    stage.check(finished(stage), created=3)


def test_a_changed_input_after_landing(stage: Stage) -> None:
    """Nothing is left to cancel, and the old results are gone before the new batch is."""
    submit(stage)
    finished(stage)
    other = other_input(stage)
    submit(stage, input=other)
    assert stage.server.count("POST", ".*/cancel") == 0
    assert stage.job().report() is None
    assert not (stage.home / "out" / "results.jsonl").exists()
    report = finished(stage, input=other)
    check_results(stage.job(input=other), report, rows=3)


def test_results_that_are_given_up_are_told_of(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """They were paid for: a person who has edited a prompt may want to know before the next time."""
    submit(stage)
    finished(stage)
    other = other_input(stage)
    with pytest.raises(InputChangedError):
        submit(stage, input=other, on_changed="fail")
    assert "results.jsonl" not in caplog.text
    submit(stage, input=other)
    assert f"removing the paid results in {stage.home / 'out' / 'results.jsonl'}" in caplog.text
    assert "on_changed='fail'" in caplog.text


def test_options_are_part_of_the_input(stage: Stage) -> None:
    old = submit(stage)
    with pytest.raises(InputChangedError):
        submit(stage, model=stage.model, on_changed="fail")
    assert submit(stage) == old


def test_an_input_deleted_after_submission_is_not_needed(stage: Stage) -> None:
    batch_id = submit(stage)
    stage.input.unlink()
    assert submit(stage) == batch_id
    stage.check(finished(stage))


def test_an_input_deleted_before_submission_is_needed(stage: Stage) -> None:
    stage.server.fail("POST", stage.jobs, Respond(400))
    with pytest.raises(BadRequestError):
        submit(stage)
    stage.input.unlink()
    with pytest.raises(ConfigurationError, match="there is no file"):
        submit(stage)
    assert not stage.batches()


def test_an_input_changed_under_the_upload_is_not_submitted(tmp_path: Path) -> None:
    """Between validation and upload: what is uploaded must be what was validated."""
    with Stage("openai", tmp_path) as stage, stage.client() as client:
        upload = client.provider.upload

        def changed(*args: Any) -> Any:
            write(stage.input, requests(stage.model, 2))
            return upload(*args)

        client.provider.upload = changed  # type: ignore[method-assign]
        with pytest.raises(JobError, match="was changed after it was validated"):
            client.submit(stage.job())
        assert not stage.batches()
        stage.check(stage.run(), rows=2)


# --- whose folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("landed", [False, True])
def test_another_jobs_folder_is_refused_naming_both(stage: Stage, landed: bool) -> None:
    submit(stage, id="mine")
    if landed:
        finished(stage, id="mine")
    before = stage.server.count()
    with pytest.raises(LedgerConflictError, match=r"holds job 'mine'; job 'yours' needs a folder of its own"):
        submit(stage, id="yours")
    with stage.client() as client, pytest.raises(JobError, match="yours was never submitted"):
        client.collect(stage.job(id="yours"))
    assert stage.server.count() == before


def test_the_same_job_in_a_moved_folder(stage: Stage) -> None:
    """With an id of its own a job can move; without one the place is its identity."""
    batch_id = submit(stage, id="mine")
    moved = stage.home / "moved"
    shutil.move(stage.home / "out", moved)
    assert submit(stage, id="mine", output=moved) == batch_id
    with pytest.raises(LedgerConflictError, match="holds job 'mine'"):
        submit(stage, output=moved)


# --- the batch ---------------------------------------------------------------------------------------


def test_a_failed_batch_is_submitted_again_by_the_next_attempt_only(stage: Stage) -> None:
    first = submit(stage)
    stage.fake.fail(first, "token_limit_exceeded", "Enqueued token limit reached.")
    with stage.client() as client:
        with pytest.raises(BatchFailedError, match="Enqueued token limit reached") as caught:
            client.collect(stage.job())  # the attempt that waited for it
        assert caught.value.batch_id == first
    assert len(stage.batches()) == 1
    second = submit(stage)
    assert second != first
    stage.check(finished(stage), created=2)


def test_a_batch_that_fails_at_once_fails_the_attempt(stage: Stage) -> None:
    """It is not tried again and again: a limit that was hit once is hit again in the same minute."""
    stage.fake.auto = None
    with stage.client() as client:
        create = client.provider.create
        made = count(1)

        def doomed(*args: Any) -> Any:
            batch = yield from create(*args)
            next(made)
            stage.fake.fail(batch.id, "token_limit_exceeded", "Enqueued token limit reached.")
            return batch

        client.provider.create = doomed  # type: ignore[method-assign]
        for attempt in (1, 2, 3):
            with pytest.raises(BatchFailedError):
                client.run(stage.job(), timeout=5)
            assert len(stage.batches()) == attempt
    submit(stage)
    stage.check(finished(stage), created=4)


def test_a_batch_cancelled_by_hand_is_made_good(stage: Stage) -> None:
    """By the next attempt, and by that once: what was done is kept."""
    first = submit(stage)
    stage.fake.cancel_now(first, done=2)
    second = submit(stage)
    assert submit(stage) == second != first
    stage.check_rounds(finished(stage), [6, 4])


def test_a_batch_cancelled_by_hand_can_be_landed_as_it_is(stage: Stage) -> None:
    """Its rows say so; the job is done, and not paid for again."""
    batch_id = submit(stage)
    stage.fake.cancel_now(batch_id, done=2)
    with stage.client() as client:
        report = client.collect(stage.job())
    assert (report.counts["succeeded"], report.counts["cancelled"]) == (2, ROWS - 2)  # type: ignore[index]
    assert stage.run() == report
    assert len(stage.batches()) == 1


def test_an_uploaded_file_that_expired_is_uploaded_again(stage: Stage) -> None:
    """The create was refused for long; by the next attempt the provider has deleted the file."""
    stage.server.fail("POST", stage.jobs, Respond(429, headers={"retry-after": "0"}), times=2)
    with pytest.raises(RateLimitError):
        submit(stage)
    assert ledger_of(stage).shards[0].step is Step.UPLOADED
    stage.fake.files.clear()  # type: ignore[attr-defined]
    with pytest.raises((BadRequestError, NotFoundError)):
        submit(stage)
    submit(stage)
    stage.check(finished(stage))


# --- the account -------------------------------------------------------------------------------------


def test_a_rotated_key_finds_the_batch(stage: Stage) -> None:
    batch_id = submit(stage)
    stage.fake.key = "new-key"
    assert submit(stage) == batch_id
    stage.check(finished(stage))


def test_a_revoked_key_leaves_the_job_as_it_was(stage: Stage) -> None:
    batch_id = submit(stage)
    right, stage.fake.key = stage.fake.key, "another"
    with stage.client() as client:
        stage.fake.key = "yet another"
        with pytest.raises(AuthenticationError):
            client.run(stage.job())
    stage.fake.key = right
    assert submit(stage) == batch_id
    stage.check(finished(stage))


def test_another_provider_address_is_another_job(stage: Stage) -> None:
    """Its batches cannot be cancelled from here: a person is told where they are."""
    batch_id = submit(stage)
    with FakeServer(stage.fake) as other:
        here, stage.api_base = stage.api_base, other.api_base
        with pytest.raises(InputChangedError, match=rf"has batches at {stage.name} \({here}\): {batch_id}"):
            submit(stage)
        assert other.calls == []
        stage.api_base = here
    stage.check(finished(stage))


# --- the ledger --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '"ledger"', "\xff"])
def test_a_corrupted_ledger_is_a_clear_error(stage: Stage, text: str) -> None:
    submit(stage)
    path = stage.home / "out" / "job.json"
    path.write_bytes(text.encode("latin-1"))
    before = stage.server.count()
    with pytest.raises(LedgerConflictError, match=r"job\.json is not a file that anybatch wrote"):
        submit(stage)
    assert stage.server.count() == before
    assert path.read_bytes() == text.encode("latin-1"), "it is left for a person to look at"


def test_a_ledger_deleted_while_the_batch_is_created(stage: Stage) -> None:
    """There is no record to write to: the batch is stopped, and the attempt says why."""
    with stage.client() as client:
        create = client.provider.create

        def robbed(*args: Any) -> Any:
            batch = yield from create(*args)
            (stage.home / "out" / "job.json").unlink()
            return batch

        client.provider.create = robbed  # type: ignore[method-assign]
        with pytest.raises(LedgerConflictError, match=r"job\.json was removed while the job was running"):
            client.submit(stage.job())
    assert stage.live() == []
    submit(stage)
    stage.check(finished(stage), created=2)


def test_a_ledger_deleted_between_attempts_begins_anew(stage: Stage) -> None:
    """Who deletes the ledger asks for that; results that were landed are replaced, never mixed."""
    submit(stage)
    finished(stage)
    (stage.home / "out" / "job.json").unlink()
    submit(stage)
    assert stage.job().report() is None
    report = finished(stage)
    check_results(stage.job(), report)
    assert len(stage.batches()) == 2


def test_a_report_lost_after_landing_is_made_again(stage: Stage) -> None:
    submit(stage)
    finished(stage)
    (stage.home / "out" / "report.json").unlink()
    posts = stage.posts()
    report = stage.run()
    assert stage.posts() == posts
    check_results(stage.job(), report)


# --- the place ---------------------------------------------------------------------------------------

_places = count()


def _pipe_plainly(self: MemoryFileSystem, path: str, value: bytes, **options: Any) -> None:
    if options:
        raise TypeError(f"pipe_file() got an unexpected keyword argument {next(iter(options))!r}")
    with self.open(path, "wb") as file:
        file.write(value)


@pytest.fixture(params=[True, False], ids=["exclusive create", "no exclusive create"])
def remote(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in an object store, of a kind that can create exclusively, and of one that cannot."""
    if not request.param:
        monkeypatch.setattr(MemoryFileSystem, "pipe_file", _pipe_plainly)
    return f"memory://bucket/job-{next(_places)}"


@pytest.mark.parametrize("name", ["openai", "mistral", "local", "anthropic"])
def test_an_object_store_as_output(name: str, remote: str, tmp_path: Path) -> None:
    with Stage(name, tmp_path) as stage:
        job = stage.job(output=remote)
        stage.check(stage.run(job), job)


def test_an_object_store_as_input_and_output(remote: str, tmp_path: Path) -> None:
    with Stage("openai", tmp_path) as stage:
        job = stage.job(input=f"{remote}-in/in.jsonl", output=remote)
        source = stage.job(output=f"{remote}-in").folder / "in.jsonl"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(stage.input.read_bytes())
        stage.check(stage.run(job), job)


def test_an_object_store_with_attempts_at_once(remote: str, tmp_path: Path) -> None:
    """In one event loop: two attempts, one batch. (Readers of fsspec's memory share a position.)"""
    with Stage("openai", tmp_path, ends=False) as stage:
        job = stage.job(output=remote, lease=60)

        async def attempt() -> list[str]:
            async with stage.aclient() as client:
                return [batch.id for batch in await client.submit(job)]

        async def both() -> list[list[str]]:
            return list(await asyncio.gather(attempt(), attempt()))

        one, two = asyncio.run(both())
        assert one == two == stage.live()
        stage.finish()
        stage.check(stage.run(job), job)


@pytest.mark.parametrize(
    ("keep", "after"),
    [
        ("until_submitted", (False, False)),
        ("until_landed", (True, False)),
        ("always", (True, True)),
    ],
)
def test_how_long_requests_given_as_objects_stay(
    tmp_path: Path, keep: KeepRequests, after: tuple[bool, bool]
) -> None:
    with Stage("openai", tmp_path) as stage:
        lines = requests(stage.model)
        kept = tmp_path / "out" / "requests.jsonl"
        hold = stage.server.hold("POST", stage.jobs, handled=False)
        job = stage.job(input=iter(lines), keep_requests=keep)
        with ThreadPoolExecutor(1) as threads, stage.client() as client:
            submitted = threads.submit(client.submit, job)
            hold.wait()
            assert [json.loads(line) for line in kept.read_text().splitlines()] == lines
            hold.release()
            submitted.result(20)
            assert kept.exists() == after[0]
            stage.finish()
            report = client.collect(job)
            assert kept.exists() == after[1]
            kept.touch()  # as an attempt leaves it that was killed when it had landed
            client.submit(replace(job, input=lines))
            assert kept.exists() == after[1]
        stage.check(report, stage.job(input=lines))


@pytest.mark.parametrize("keep", ["until_submitted", "until_landed"])
def test_a_batch_that_somebody_cancelled_lands_without_its_requests(
    tmp_path: Path, keep: KeepRequests
) -> None:
    """Nobody asked for another round: without the request lines the cancelled rows land as they are."""
    with Stage("openai", tmp_path, ends=False) as stage, stage.client() as client:
        job = stage.job(input=requests(stage.model), keep_requests=keep)
        (batch,) = client.submit(job)
        stage.fake.cancel_now(batch.id, done=2)
        again = client.resume(replace(job, input=()))
        assert again.landed == (keep == "until_submitted")
        assert len(stage.batches()) == 1 + (keep == "until_landed")


def test_a_landed_job_that_is_reopened_keeps_its_requests_again(tmp_path: Path) -> None:
    """Else `resume` would find no input for the round after."""
    with Stage("openai", tmp_path, done=2) as stage, stage.client() as client:
        lines = requests(stage.model)
        kept = tmp_path / "out" / "requests.jsonl"
        stage.run(stage.job(input=lines))
        assert not kept.exists()
        client.submit(stage.job(input=lines, max_rounds=3))
        assert [json.loads(line) for line in kept.read_text().splitlines()] == lines


@pytest.mark.parametrize("given", ["once more", "not again"])
def test_a_later_round_of_requests_that_were_not_kept(tmp_path: Path, given: str) -> None:
    with Stage("openai", tmp_path, done=2) as stage, stage.client() as client:
        lines = requests(stage.model)
        job = stage.job(input=lines, keep_requests="until_submitted", max_rounds=2)
        (batch,) = client.submit(job)
        client.wait(batch.id)
        if given == "not again":
            with pytest.raises(InputChangedError, match="was removed"):
                client.resume(job)
            assert len(stage.batches()) == 1
        stage.check_rounds(stage.run(job), [6, 4], job)


@pytest.mark.parametrize("name", ["requests.jsonl", "ids.jsonl", "results.jsonl", "round-1.jsonl"])
def test_an_input_among_the_files_of_the_job_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    """The job would replace or remove it."""
    with Stage("openai", tmp_path) as stage, stage.client() as client:
        path = tmp_path / "out" / name
        path.parent.mkdir()
        write(path, requests(stage.model))
        before = path.read_bytes()
        with pytest.raises(ConfigurationError, match="own folder under a name of its files"):
            client.submit(stage.job(input=path))
        assert path.read_bytes() == before
        assert not stage.batches()


def test_output_and_job_are_values() -> None:
    """Two jobs made alike are the same job, and paths are taken as they are given."""
    assert Job(input="in.jsonl", output="out") == Job(input="in.jsonl", output="out")
    assert Job(input="in.jsonl", output="out").identity == str(Path("out").absolute())
