"""AnyBatchResultsOperator: lands the results of batches that any task or system created."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException, BaseOperator

from anybatch_airflow.base import HasAccount, final_errors_skip_retries, job_id, task_instance
from anybatch_airflow.inputs import HasOutput, batch_ids, checked_choice, location, plain
from anybatch_airflow.landing import land
from anybatch_airflow.lineage import openlineage_facets
from anybatch_airflow.links import BatchLink, ResultsLink, push_links

if TYPE_CHECKING:
    import os
    from collections.abc import Collection

    from airflow.providers.common.compat.sdk import Context

    from anybatch.jobs.options import OnPartial
    from anybatch_airflow.inputs import BatchIds


class AnyBatchResultsOperator(HasOutput, HasAccount, BaseOperator):
    """Lands the rows of ended batches as results.jsonl and report.json; returns the same manifest as a job.

    Every row is counted. A row that the provider's files do not mention counts by the end of its batch
    (`expired`, `cancelled`, else `missing`), but it has no line, as its custom_id is not known here. A line
    that cannot be read, or cannot be written as a row, is a `failed` row with the code `undecodable_line`;
    its bytes, and those of lines that repeat a row, are in stray.jsonl beside the results. If two lines are
    for one row, a success wins. Rows come in the provider's order, batch after batch (`Client.land_batches`).
    `AnyBatchOperator` knows its input, and so has a line for every row, in the input's order.

    Put an `AnyBatchSensor` before it: a batch that still runs fails the task (a retry may find it ended).

    Args:
        batch_id: One id or several; the XCom of another task, or a template.
        output: Where results.jsonl and report.json go: a folder of this task's own, local or
            `s3://conn_id@bucket/…`. It replaces what an earlier run of the task put there. The template field
            and the attribute are called `output_folder`.
        endpoint: The dialect of the bodies, if the batch does not name its endpoint: on Anthropic,
            `/v1/messages` gives native bodies.
        conn_id: Airflow connection; may be left out if `provider` is given.
        provider: Overrides the connection's provider, or names the one whose environment variables to use.
        api_base: Overrides the connection's base URL.
        on_partial: "keep", or "fail" to fail the task, after landing and without a retry, if any row has no
            result.
        max_failed_ratio: As on `AnyBatchOperator`.
        price: As on `AnyBatchOperator`.
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
        self.on_partial: OnPartial = checked_choice("on_partial", on_partial)
        self.max_failed_ratio = max_failed_ratio
        self.price = price
        self.manifest: dict[str, Any] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Check that all batches have ended, then land the rows of all."""
        from anybatch import BatchFailedError, BatchNotCompleteError

        ti = task_instance(context)
        with final_errors_skip_retries(), self.hook().get_client() as client:
            ids = batch_ids(self.batch_id)
            push_links(ti, batches=self.hook().console_url(client, ids), results=self.output_folder)
            try:
                report = client.land_batches(
                    ids, location(self.output_folder), endpoint=self.endpoint, id=job_id(ti), price=self.price
                )
            except BatchFailedError as error:
                raise AirflowFailException(f"there are no results to land: {error}") from error
            except BatchNotCompleteError as error:
                hint = "Put an AnyBatchSensor with the same batch_id before this task."
                raise AirflowException(f"{error}. {hint}") from error
        return land(self, context, report)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """For OpenLineage's listener, which calls this on the worker."""
        return openlineage_facets(None, self.manifest)
