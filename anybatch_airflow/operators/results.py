"""The results of batches that have ended, as a file."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException, BaseOperator

from anybatch_airflow.account import OnAccount, final_errors, job_id, task_instance
from anybatch_airflow.inputs import HasOutput, batch_ids, location, plain
from anybatch_airflow.landing import land
from anybatch_airflow.lineage import openlineage_facets
from anybatch_airflow.links import BatchLink, ResultsLink, push_links
from anybatch_airflow.policies import batches_in_words, chosen

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterator, Sequence
    from typing import BinaryIO

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch, BatchRecord, Client, Report, Row
    from anybatch.jobs.folder import JobFolder
    from anybatch.jobs.options import OnPartial
    from anybatch_airflow.inputs import BatchIds


class AnyBatchResultsOperator(HasOutput, OnAccount, BaseOperator):
    """Lands the rows of ended batches as results.jsonl and report.json; returns the same manifest as a job.

    For batches of `AnyBatchCreateOperator`, or of another system. Every row is counted: one that the
    provider's files do not mention counts by the end of its batch (`expired`, `cancelled`, else `missing`),
    but as its custom_id is not known here, it has no line. A line that cannot be read, or cannot be
    written as a row, is a `failed` row with the code `undecodable_line`; the provider's own bytes of it, and
    of lines that repeat a row, are in stray.jsonl beside the results. Rows come in the provider's order,
    batch after batch; `AnyBatchOperator`, which knows its input, has a line for every row, in the input's
    order.

    Put an `AnyBatchSensor` before it: a batch that still runs fails the task (a retry may find it ended).

    :param batch_id: One id or several; the XCom of another task, or a template.
    :param output: Where results.jsonl and report.json go: a folder of this task's own, local or
        `s3://conn_id@bucket/…`. What an earlier run of the task has put there is replaced. The templated
        field, and the attribute, is `output_folder`.
    :param endpoint: The dialect of the bodies, where the batch does not tell it: on Anthropic, `/v1/messages`
        gives native ones.
    :param conn_id: Airflow connection; may be left out if `provider` is given.
    :param provider: Overrides the connection's, or names the one whose environment variables to use.
    :param api_base: Overrides the connection's.
    :param on_partial: "keep", or "fail" to fail the task, after landing and without a retry, if any row has
        no result.
    :param max_failed_ratio: As on `AnyBatchOperator`.
    :param price: As on `AnyBatchOperator`.
    """

    template_fields: Collection[str] = (
        "batch_id",
        "output_folder",
        "endpoint",
        "conn_id",
        "provider",
        "api_base",
    )
    operator_extra_links = (BatchLink(), ResultsLink())
    ui_color = "#e8eefc"

    def __init__(
        self,
        *,
        batch_id: BatchIds,
        output: str | os.PathLike[str],
        endpoint: str | None = None,
        conn_id: str | None = None,
        provider: str | None = None,
        api_base: str | None = None,
        on_partial: OnPartial = "keep",
        max_failed_ratio: float | None = None,
        price: tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_id = batch_id
        self.output_folder = plain(output)
        self.endpoint = endpoint
        self.conn_id = conn_id
        self.provider = provider
        self.api_base = api_base
        self.on_partial: OnPartial = chosen("on_partial", on_partial)
        self.max_failed_ratio = max_failed_ratio
        self.price = price
        self.manifest: dict[str, Any] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Look at all, then land the rows of all."""
        from anybatch import BatchFailedError
        from anybatch.jobs.folder import JobFolder
        from anybatch.paths import open_path

        with final_errors(), self.hook().get_client() as client:
            ids = batch_ids(self.batch_id)
            folder = JobFolder(open_path(location(self.output_folder)).absolute())
            _refuse_job(folder)
            push_links(
                task_instance(context),
                batches=self.hook().console_url(client, ids),
                results=self.output_folder,
            )
            batches = _ended([client.retrieve(batch_id) for batch_id in ids])
            try:
                report = self._land_rows(client, batches, folder, job_id(task_instance(context)))
            except BatchFailedError as error:
                raise AirflowFailException(f"there are no results: {error}") from error
        return land(self, context, report)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """What OpenLineage is told; Airflow's listener calls this on the worker."""
        return openlineage_facets(None, self.manifest)

    def _land_rows(self, client: Client, batches: Sequence[Batch], folder: JobFolder, job: str) -> Report:
        folder.path.mkdir(parents=True, exist_ok=True)
        with folder.scratch() as scratch:
            landing, stray = scratch / "results.jsonl", scratch / "stray.jsonl"
            with landing.open("wb") as out, stray.open("wb") as strays:
                count = _Count(out, strays)
                for batch in batches:
                    count.add(batch, client.results(batch.id, endpoint=self.endpoint))
            if count.unmentioned:
                self.log.warning(
                    "%d rows are in none of the provider's files and have no line", count.unmentioned
                )
            report = count.report(job, batches, str(folder / "results.jsonl"), self.price)
            # Only now, when every download has come to its end: one that breaks replaces nothing.
            with folder.locked():
                folder.put(landing, "results.jsonl")
                if stray.stat().st_size:
                    folder.put(stray, "stray.jsonl")
                else:
                    folder.discard("stray.jsonl")
                folder.replace("report.json", report.model_dump_json(indent=1).encode())
        return report


class _Count:
    """What the rows of all batches add up to, while they are written; `strays` gets lines as they came."""

    def __init__(self, out: BinaryIO, strays: BinaryIO) -> None:
        from anybatch.rows.tally import Tally

        self._out, self._strays = out, strays
        self.tally = Tally()
        self.records: list[BatchRecord] = []
        self.unmentioned = 0
        self.endpoint = ""

    def add(self, batch: Batch, rows: Iterator[Row]) -> None:
        """Write a batch's rows, each once, and count those that no line speaks of."""
        from anybatch.rows.merge import unanswered

        seen: set[str] = set()
        landed = 0
        for row in rows:
            if row.custom_id in seen:
                self.tally.unexpected += 1
                self._stray(row)
                continue
            if row.custom_id:  # a line whose id cannot be read has none, and is a row of its own
                seen.add(row.custom_id)
            self._land(row)
            landed += 1
        total = max(batch.request_counts.total if batch.request_counts else 0, landed)
        if lacking := total - landed:
            self.unmentioned += lacking
            self.tally.counts[unanswered("", batch.status).outcome] += lacking
        self._note(batch, total)

    def _land(self, row: Row) -> None:
        """Write a row; one that cannot be written costs itself alone."""
        from anybatch.rows.results import UNDECODABLE, landed_line

        try:
            line = landed_line(row)
        except (TypeError, ValueError, RecursionError) as error:  # nested deeper than can be written
            row = _undecodable(row, error)
            line = landed_line(row)
        self._out.write(line)
        self.tally.counts[row.outcome] += 1
        if row.outcome == "succeeded" and row.result is not None:
            self.tally.add_body(row.result)
        if row.error is not None and row.error.code == UNDECODABLE:
            self._stray(row)

    def _stray(self, row: Row) -> None:
        self._strays.write(row.raw + b"\n")

    def _note(self, batch: Batch, rows: int) -> None:
        from anybatch import BatchRecord

        self.endpoint = self.endpoint or batch.endpoint or ""
        self.records.append(
            BatchRecord(
                id=batch.id,
                shard=len(self.records),
                round=1,
                rows=rows,
                status=batch.status,
                input_file_id=batch.input_file_id,
                output_file_id=batch.output_file_id,
                error_file_id=batch.error_file_id,
            )
        )

    def report(
        self, job: str, batches: Sequence[Batch], results: str, price: tuple[float, float] | None
    ) -> Report:
        from anybatch import Outcome, Report

        tally, now = self.tally, time.time()
        began = min((batch.created_at for batch in batches if batch.created_at), default=now)
        cost = tally.cost
        if cost is None and price is not None:
            cost = (tally.input_tokens * price[0] + tally.output_tokens * price[1]) / 1e6
        return Report(
            job=job,
            provider=batches[0].provider,
            endpoint=self.endpoint,
            models=tuple(tally.models),
            rows=sum(record.rows for record in self.records),
            counts={outcome: tally.counts[outcome] for outcome in Outcome},
            unexpected=tally.unexpected,
            usage=tally.usage,
            cost=cost,
            started_at=began,
            finished_at=now,
            duration_s=round(now - began, 3),
            batches=tuple(self.records),
            results=results,
        )


def _undecodable(row: Row, error: Exception) -> Row:
    from anybatch import Outcome, Row, RowError
    from anybatch.rows.results import UNDECODABLE

    return Row(row.custom_id, Outcome.FAILED, None, RowError(UNDECODABLE, str(error)), raw=row.raw)


def _refuse_job(folder: JobFolder) -> None:
    """A job lands its results itself, and they are not to be overwritten by a part of them."""
    from anybatch import ConfigurationError

    if (ledger := folder.read()) is not None:
        raise ConfigurationError(f"{folder.path} holds job {ledger.job!r}; give `output` a folder of its own")


def _ended(batches: Sequence[Batch]) -> Sequence[Batch]:
    if running := [batch for batch in batches if not batch.status.is_terminal]:
        raise AirflowException(
            f"{batches_in_words(running)}: there are results once a batch has ended. Put an AnyBatchSensor "
            "with the same batch_id before this task."
        )
    return batches
