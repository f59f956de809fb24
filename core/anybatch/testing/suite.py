"""The tests that every provider must pass, with a fake server of its wire format and with both clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from ..errors import (
    BatchFailedError,
    BatchNotCompleteError,
    ConfigurationError,
    CreateOutcomeUnknownError,
    OrphanError,
    UnknownOptionError,
)
from ..jobs.job import Job
from ..models import Batch, BatchStatus, Outcome
from ..providers import get_provider, provider_names
from ..providers.base import Provider
from ..providers.traits import Cancel, Lookup
from .driver import MODES, Driver
from .pauses import shorten_pauses
from .wire import Fake, Wire

ROWS = 6
# Realistic custom_ids. If the provider does not accept such ids, its codec must change them, and change them
# back.
IDS = [f"row {number}/ä" for number in range(ROWS)]


class ProviderSuite:
    """The tests; subclass this as `Test…`, set `name` and implement `make_fake`.

    Attributes:
        name: The provider's name.
        endpoint: The endpoint of the requests.
        window: The completion window.
        model: The model of the requests.
        settings: The settings that the account needs beside a key.
        ends: The statuses that the provider's batches can end with.
    """

    name: ClassVar[str]
    endpoint: ClassVar[str] = "/v1/chat/completions"
    window: ClassVar[str] = "24h"
    model: ClassVar[str] = "m-1"
    settings: ClassVar[Mapping[str, str]] = {}
    ends: ClassVar[frozenset[BatchStatus]] = frozenset(
        {BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
    )

    def make_fake(self) -> Fake:
        """Make the fake server of a test; subclasses implement this.

        Returns:
            A server without any batch.
        """
        raise NotImplementedError

    def make_provider(self) -> Provider:
        """Open the account of a test.

        Returns:
            The account.
        """
        return get_provider(self.name, api_key="test-key", **self.settings)

    def body(self, text: str) -> dict[str, Any]:
        """Make a request body for the endpoint.

        Args:
            text: The prompt.

        Returns:
            The body.
        """
        return {"model": self.model, "messages": [{"role": "user", "content": text}]}

    # --- fixtures ------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _short_pauses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shorten_pauses(monkeypatch)

    @pytest.fixture(params=MODES)
    def mode(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def fake(self) -> Fake:
        return self.make_fake()

    @pytest.fixture
    def wire(self, fake: Fake) -> Wire:
        return Wire(fake)

    @pytest.fixture
    def driver(self, mode: str, wire: Wire) -> Iterator[Driver]:
        provider = self.make_provider()
        provider.poll_seconds = (0.0, 0.0)
        with Driver(mode, provider, client_args={"transport": httpx.MockTransport(wire)}) as driver:
            yield driver

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        """An input file with a request for each of IDS."""
        lines = [
            {"custom_id": one, "method": "POST", "url": self.endpoint, "body": self.body(f"say {one}")}
            for one in IDS
        ]
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def create(self, driver: Driver, source: Path) -> Batch:
        batch: Batch = driver.create(source, self.endpoint, completion_window=self.window)
        return batch

    def job(self, source: Path, **more: Any) -> Job:
        output = source.parent / "out"
        options = {"endpoint": self.endpoint, "completion_window": self.window, **more}
        return Job(input=source, output=output, **options)

    def needs(self, status: BatchStatus) -> None:
        if status not in self.ends:
            pytest.skip(f"no batch of {self.name} ends {status}")

    # --- the provider itself ---------------------------------------------------------------------------

    def test_it_is_registered(self) -> None:
        assert self.name in provider_names()
        assert self.make_provider().name == self.name

    def test_unknown_options_are_refused(self, driver: Driver, source: Path) -> None:
        acts: tuple[Callable[[], Any], ...] = (
            lambda: driver.create(source, self.endpoint, completion_window=self.window, unheard_of=1),
            lambda: driver.list(unheard_of=1),
            lambda: driver.retrieve("batch-1", unheard_of=1),
            lambda: driver.cancel("batch-1", unheard_of=1),
            lambda: driver.results("batch-1", unheard_of=1),
            lambda: driver.download("batch-1", source.parent, unheard_of=1),
        )
        for act in acts:
            with pytest.raises(UnknownOptionError, match="unheard_of"):
                act()

    def test_unknown_endpoints_are_refused(self, driver: Driver, wire: Wire, source: Path) -> None:
        if driver.provider.traits.endpoints is None:
            pytest.skip("any endpoint will do")
        with pytest.raises(ConfigurationError, match="endpoint"):
            driver.create(source, "/v1/unheard-of")
        assert wire.calls == []

    def test_other_hosts_see_no_key(self) -> None:
        provider = self.make_provider()
        elsewhere = httpx.Request("GET", "https://elsewhere.example/results?signature=1")
        before = dict(elsewhere.headers)
        sent = next(provider.auth().sync_auth_flow(elsewhere))
        assert dict(sent.headers) == before

    # --- one batch -------------------------------------------------------------------------------------

    def test_create_and_retrieve(self, driver: Driver, fake: Fake, source: Path) -> None:
        batch = self.create(driver, source)
        assert [batch.id] == list(fake.batch_ids)
        assert batch.provider == self.name
        assert not batch.status.is_terminal
        assert batch.status is not BatchStatus.UNKNOWN
        again = driver.retrieve(batch.id)
        assert again.id == batch.id
        assert again.created_at is not None
        with pytest.raises(BatchNotCompleteError):
            driver.results(batch.id)

    def test_a_listing_is_read_to_its_end(self, driver: Driver, fake: Fake, source: Path) -> None:
        assert list(driver.list()) == []
        for _ in range(3):
            self.create(driver, source)
        listed: list[str] = []
        after = None
        for _ in range(10):
            page = driver.list(after=after, limit=2)
            listed += [batch.id for batch in page]
            after = page.next_cursor
            if after is None:
                break
        assert sorted(listed) == sorted(fake.batch_ids)

    def test_cancel(self, driver: Driver, fake: Fake, source: Path) -> None:
        batch = self.create(driver, source)
        if driver.provider.traits.cancel is Cancel.NONE:
            with pytest.raises(ConfigurationError, match="cannot cancel"):
                driver.cancel(batch.id)
            return
        stopping = {BatchStatus.CANCELLING, BatchStatus.CANCELLED}
        assert driver.cancel(batch.id).status in stopping
        if driver.provider.traits.cancel is Cancel.NORMAL:
            assert driver.cancel(batch.id).status in stopping, "a second time is no error"

    def test_cancel_of_what_has_ended(self, driver: Driver, fake: Fake, source: Path) -> None:
        if driver.provider.traits.cancel is not Cancel.NORMAL:
            pytest.skip("it is not asked to")
        batch = self.create(driver, source)
        fake.end(batch.id, BatchStatus.COMPLETED)
        assert driver.cancel(batch.id).status is BatchStatus.COMPLETED

    def test_wait_and_results(self, driver: Driver, fake: Fake, source: Path, tmp_path: Path) -> None:
        batch = self.create(driver, source)
        fake.end(batch.id, BatchStatus.COMPLETED)
        ended = driver.wait(batch.id, timeout=10)
        assert ended.status is BatchStatus.COMPLETED
        assert IDS[0] not in json.dumps(ended.raw, ensure_ascii=False), "results never stay in `raw`"
        rows = driver.results(batch.id, endpoint=self.endpoint)
        original = driver.provider.codec.original_ids(IDS)
        assert sorted(original.get(row.custom_id, row.custom_id) for row in rows) == sorted(IDS)
        assert {row.outcome for row in rows} == {Outcome.SUCCEEDED}
        assert all(row.result for row in rows)
        paths = driver.download(batch.id, tmp_path / "files")
        assert sum(len(path.read_bytes().splitlines()) for path in paths) == ROWS

    @pytest.mark.parametrize("status", [BatchStatus.EXPIRED, BatchStatus.CANCELLED])
    def test_what_was_finished_is_read(
        self, driver: Driver, fake: Fake, source: Path, status: BatchStatus
    ) -> None:
        self.needs(status)
        batch = self.create(driver, source)
        fake.end(batch.id, status)
        assert driver.retrieve(batch.id).status is status
        rows = driver.results(batch.id, endpoint=self.endpoint)
        assert sum(row.outcome is Outcome.SUCCEEDED for row in rows) == ROWS // 2

    def test_a_batch_that_was_refused_as_a_whole(self, driver: Driver, fake: Fake, source: Path) -> None:
        self.needs(BatchStatus.FAILED)
        batch = self.create(driver, source)
        fake.end(batch.id, BatchStatus.FAILED)
        with pytest.raises(BatchFailedError):
            driver.results(batch.id)

    def test_files_can_be_deleted(self, driver: Driver, fake: Fake, source: Path) -> None:
        batch = self.create(driver, source)
        fake.end(batch.id, BatchStatus.COMPLETED)
        ended = driver.retrieve(batch.id)
        for _ in range(2):  # deleting them again is no error
            driver.perform(driver.provider.delete_files(ended))

    # --- a job -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("status", [BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED])
    def test_a_job_accounts_for_every_row(
        self, driver: Driver, fake: Fake, source: Path, status: BatchStatus
    ) -> None:
        self.needs(status)
        self.land(driver, fake, self.job(source), status)

    def test_a_job_of_several_shards(self, driver: Driver, fake: Fake, source: Path) -> None:
        self.land(driver, fake, self.job(source, shard_requests=2), BatchStatus.COMPLETED)
        assert len(fake.batch_ids) == ROWS // 2

    def test_a_job_over_a_bad_line(self, driver: Driver, wire: Wire, fake: Fake, source: Path) -> None:
        wire.fails_first = True
        wire.cuts_first = 200
        self.land(driver, fake, self.job(source), BatchStatus.COMPLETED)
        assert len(fake.batch_ids) == 1

    def test_a_refused_batch_is_submitted_again(self, driver: Driver, fake: Fake, source: Path) -> None:
        self.needs(BatchStatus.FAILED)
        job = self.job(source)
        driver.submit(job)
        fake.end(fake.batch_ids[-1], BatchStatus.FAILED)
        with pytest.raises(BatchFailedError):
            driver.collect(job)
        self.land(driver, fake, job, BatchStatus.COMPLETED)
        assert len(fake.batch_ids) == 2

    def test_a_create_without_an_answer(
        self, mode: str, driver: Driver, wire: Wire, fake: Fake, source: Path
    ) -> None:
        """Its batch is found, or a person must look for it; but it is never created twice."""
        traits, job = driver.provider.traits, self.job(source)
        wire.lost_creates = 1
        if traits.lookup is Lookup.NONE and not traits.idempotent_create:
            with pytest.raises((OrphanError, CreateOutcomeUnknownError)):
                driver.submit(job)
            assert len(fake.batch_ids) == 1
            return
        self.land(driver, fake, job, BatchStatus.COMPLETED)
        assert len(fake.batch_ids) == 1

    def land(self, driver: Driver, fake: Fake, job: Job, status: BatchStatus) -> None:
        """Submit the job, let its batches end, and check that every row is in its place."""
        driver.submit(job)
        for batch_id in fake.batch_ids:
            if not driver.retrieve(batch_id).status.is_terminal:
                fake.end(batch_id, status)
        report = driver.collect(job)
        landed = (Path(str(job.output)) / "results.jsonl").read_bytes()
        lines = [json.loads(line) for line in landed.split(b"\n")[:-1]]
        assert [line["custom_id"] for line in lines] == IDS
        good = ROWS if status is BatchStatus.COMPLETED else ROWS // 2
        assert report.counts[Outcome.SUCCEEDED] == good
        if good < ROWS:
            rest = Outcome.EXPIRED if status is BatchStatus.EXPIRED else Outcome.CANCELLED
            assert report.counts[rest] == ROWS - good
