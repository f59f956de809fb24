"""AnyBatchCreateOperator: submits requests as batches, and does not wait."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anybatch_airflow.base import final_errors_skip_retries, job_id, task_instance
from anybatch_airflow.lineage import openlineage_facets
from anybatch_airflow.links import BatchLink, push_links
from anybatch_airflow.operators.submitting import SubmittingOperator
from anybatch_airflow.reporting import batches_in_words

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch, Client
    from anybatch_airflow.state_store import KnownBatches, TaskStateFolder


class AnyBatchCreateOperator(SubmittingOperator):
    """Submits requests as batches and returns their ids, as a list even if there is one; does not wait.

    For DAGs in which something else waits, or lands the results: `AnyBatchSensor` waits for the ids and
    `AnyBatchResultsOperator` lands them.

    A retry or a clear creates nothing twice. On Airflow 3.3 the task state store records what was submitted.
    Before 3.3 the provider is asked for batches with this task instance's metadata; a changed input of the
    same size goes unnoticed there. Only a cancelled batch is created anew, with all of its rows;
    `AnyBatchOperator` keeps the finished ones.

    That metadata names DAG, task, run and map index. If several deployments with the same DAGs share an
    account, give each a name by the option `[anybatch] deployment`, which becomes part of it; otherwise one
    deployment may take over another's batches.

    Args:
        input: As on `AnyBatchOperator`.
        endpoint: As on `AnyBatchOperator`.
        prompt: As on `AnyBatchOperator`, and so are `id_column`, `system`, `body` and `model`.
        conn_id: Airflow connection; may be left out if `provider` is given.
        provider: Overrides the connection's provider, or names the one whose environment variables to use.
        api_base: Overrides the connection's base URL.
        completion_window: How long the provider may take, in the provider's own words.
        metadata: Strings to put on every batch besides anybatch's own.
        options: The provider's own options for creating a batch.
        on_orphan: "fail" or "resubmit", if a batch may exist that cannot be looked up, or if the provider's
            list of batches cannot be read to its end.
        on_changed: "cancel_and_resubmit" or "fail", if the input is not what was submitted before.
        on_untranslatable: "fail" or "drop", for parameters that the provider does not have.
    """

    operator_extra_links = (BatchLink(),)

    def execute(self, context: Context) -> list[str]:
        """Submit, or find what an earlier attempt submitted."""
        from anybatch_airflow.state_store import forget_cancelled

        ti = task_instance(context)
        with (
            final_errors_skip_retries(),
            self.hook().get_client() as client,
            tempfile.TemporaryDirectory(prefix="anybatch-") as scratch,
        ):
            found: list[Batch] = []
            folder = self._folder(context, client, Path(scratch), found)
            forget_cancelled(client, folder)
            batches = client.submit(self._job(context, self._requests(context), folder))
            ids = [batch.id for batch in batches]
            # Perhaps batches of an earlier input that was split otherwise, perhaps another deployment's.
            others = [batch for batch in found if batch.id not in ids and not batch.status.is_terminal]
            if others:
                self.log.warning(
                    "more running batches carry this task's metadata than it needs: %s. Cancel them if they "
                    "are not another deployment's", batches_in_words(others),
                )  # fmt: skip
            push_links(ti, batches=self.hook().console_url(client, ids))
        self.log.info("%s", batches_in_words(batches))
        return ids

    def _folder(self, context: Context, client: Client, scratch: Path, found: list[Batch]) -> TaskStateFolder:
        """The folder whose ledger records what was submitted.

        Args:
            context: Airflow's context of the running task.
            client: The client of the task's account.
            scratch: A temporary folder.
            found: Gets the batches that the provider knows, if the record is empty.
        """
        from anybatch_airflow.state_store import (
            KnownBatches,
            NoStore,
            TaskStateFolder,
            can_find_by_metadata,
            find_batches,
            start_of_run,
            unknown_attempts_error,
        )

        ti, store = task_instance(context), context.get("task_state_store")
        provider = client.provider

        def look() -> KnownBatches:
            if ti.try_number == 1:  # no earlier attempt
                return KnownBatches()
            if not can_find_by_metadata(provider):
                if store is None and self.on_orphan == "fail":
                    raise unknown_attempts_error(provider, ti.try_number)
                return KnownBatches()
            batches, is_whole = find_batches(client, job_id(ti), start_of_run(context))
            found.extend(batches)
            return KnownBatches(batches, is_whole or self.on_orphan == "resubmit")

        return TaskStateFolder(scratch, NoStore() if store is None else store, look)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """For OpenLineage's listener, which calls this on the worker."""
        return openlineage_facets(self.source, None)
