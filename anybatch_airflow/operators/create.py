"""Submitting requests as batches, and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anybatch_airflow.account import final_errors, job_id, task_instance
from anybatch_airflow.lineage import openlineage_facets
from anybatch_airflow.links import BatchLink, push_links
from anybatch_airflow.operators.submitting import SubmittingOperator
from anybatch_airflow.policies import batches_in_words

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch, Client
    from anybatch_airflow.taskstate import Found, TaskStateFolder


class AnyBatchCreateOperator(SubmittingOperator):
    """Submits requests as batches and returns their ids, a list even of one; does not wait.

    For DAGs whose waiting or whose results are someone else's; `AnyBatchSensor` waits for the ids and
    `AnyBatchResultsOperator` lands them. A retry or a clear creates nothing twice: on Airflow 3.3 what was
    submitted is on record in the task state store; before, the provider is asked for batches that carry the
    marks of this task instance, and other input of the same size is not noticed. Only a batch that was
    cancelled is created anew, as a whole; `AnyBatchOperator` keeps its finished rows.

    The marks are DAG, task, run and map index. Where several deployments with the same DAGs share an account,
    give each a name by the option `[anybatch] deployment`, which becomes part of them: else one may take up
    the batches of another.

    :param input: As on `AnyBatchOperator`.
    :param endpoint: As on `AnyBatchOperator`.
    :param prompt: As on `AnyBatchOperator`, and so are `id_column`, `system`, `body` and `model`.
    :param conn_id: Airflow connection; may be left out if `provider` is given.
    :param provider: Overrides the connection's, or names the one whose environment variables to use.
    :param api_base: Overrides the connection's.
    :param completion_window: What to ask of the provider.
    :param metadata: Strings to put on every batch beside anybatch's own.
    :param options: The provider's own create options.
    :param on_orphan: "fail" or "resubmit", where a batch may have been created but cannot be looked up, or
        the provider's list of batches cannot be read to its end.
    :param on_changed: "cancel_and_resubmit" or "fail", where the input is not what it was.
    :param on_untranslatable: "fail" or "drop", for parameters that the provider does not have.
    """

    operator_extra_links = (BatchLink(),)

    def execute(self, context: Context) -> list[str]:
        """Submit, or find what an earlier attempt submitted."""
        from anybatch_airflow.taskstate import forget_dead

        ti = task_instance(context)
        with (
            final_errors(),
            self.hook().get_client() as client,
            tempfile.TemporaryDirectory(prefix="anybatch-") as scratch,
        ):
            found: list[Batch] = []
            folder = self._folder(context, client, Path(scratch), found)
            forget_dead(client, folder)
            batches = client.submit(self._job(context, self._requests(context), folder))
            ids = [batch.id for batch in batches]
            # Doubles, or those of an input that was split otherwise; but they may be another deployment's.
            others = [batch for batch in found if batch.id not in ids and not batch.status.is_terminal]
            if others:
                self.log.warning(
                    "there are more batches with the marks of this task: %s. Cancel them if they are not "
                    "another deployment's", batches_in_words(others),
                )  # fmt: skip
            push_links(ti, batches=self.hook().console_url(client, ids))
        self.log.info("%s", batches_in_words(batches))
        return ids

    def _folder(self, context: Context, client: Client, scratch: Path, found: list[Batch]) -> TaskStateFolder:
        """The record of what was submitted; where it knows nothing, `found` gets what the provider knows."""
        from anybatch_airflow.taskstate import (
            Found,
            NoStore,
            TaskStateFolder,
            begin_of_run,
            blind,
            find_batches,
            has_marks,
        )

        ti, store = task_instance(context), context.get("task_state_store")
        provider = client.provider

        def look() -> Found:
            if ti.try_number == 1:  # there was no attempt before
                return Found()
            if not has_marks(provider):
                if store is None and self.on_orphan == "fail":
                    raise blind(provider, ti.try_number)
                return Found()
            batches, is_whole = find_batches(client, job_id(ti), begin_of_run(context))
            found.extend(batches)
            return Found(batches, is_whole or self.on_orphan == "resubmit")

        return TaskStateFolder(scratch, NoStore() if store is None else store, look)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """What OpenLineage is told; Airflow's listener calls this on the worker."""
        return openlineage_facets(self.source, None)
