"""The buttons on a task instance: one to its batch at the provider, one to its results.

An operator sets `operator_extra_links = (BatchLink(), ResultsLink())` and calls, right after submitting,

    push_links(ti, batches=hook.console_url(client, batch_ids), results=job_folder)

which pushes two XComs, `batch_url` and `results_url`: the whole URL, or "" if there is no page to show. The
API server reads only these XComs; it imports neither the DAG file nor this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote, urlsplit

from airflow.providers.common.compat.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import BaseOperator, TaskInstanceKey

BATCH_URL = "batch_url"
RESULTS_URL = "results_url"


class _PushedLink(BaseOperatorLink):
    """A link whose URL the operator has pushed as an XCom."""

    label: ClassVar[str]
    key: ClassVar[str]

    @property
    def name(self) -> str:
        return self.label

    @property
    def xcom_key(self) -> str:
        return self.key

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The URL that was pushed. Airflow asks at each end of the task, and stores the answer again."""
        ti: Any = ti_key  # on a worker Airflow passes the running task instance
        if (pushed := _pushed.get(_key(ti))) is not None:
            return pushed[self.key]
        context = getattr(ti, "_ti_context_from_server", None)
        if context is not None and getattr(context, "next_method", None) is None:
            return ""  # the task ended before it had a batch; asking for the XCom would only log an error
        # This process resumed after a deferral and failed before it pushed links: the earlier ones hold.
        from airflow.providers.common.compat.sdk import XCom

        return str(XCom.get_value(ti_key=ti, key=self.key) or "")


class BatchLink(_PushedLink):
    """The provider's page of the batch, or of all batches if a job has several."""

    label = "Batch at the provider"
    key = BATCH_URL


class ResultsLink(_PushedLink):
    """The page of the object store that shows the results."""

    label = "Results"
    key = RESULTS_URL


_pushed: dict[tuple[str, str, str, int], dict[str, str]] = {}
"""What this process has pushed, by task instance. (A worker's process runs one task instance.)"""


def push_links(ti: Any, *, batches: str | None, results: object = None) -> None:
    """Push the URLs of the two links.

    Args:
        ti: The running task instance.
        batches: URL of the provider's page, None if there is none.
        results: Path or URL of the job's folder.
    """
    links = {BATCH_URL: batches or "", RESULTS_URL: (results_url(str(results)) if results else None) or ""}
    _pushed[_key(ti)] = links
    for key, url in links.items():
        ti.xcom_push(key=key, value=url)


def _key(ti: Any) -> tuple[str, str, str, int]:
    return ti.dag_id, ti.task_id, ti.run_id, ti.map_index


def results_url(location: str) -> str | None:
    """The web page of a folder on an object store; None if a browser cannot show the folder."""
    parts = urlsplit(location)
    bucket, key = parts.netloc.rpartition("@")[2], quote(parts.path.strip("/"))
    if parts.scheme in ("http", "https"):
        return location
    if parts.scheme in ("s3", "s3a"):
        return f"https://s3.console.aws.amazon.com/s3/buckets/{bucket}?prefix={key}/"
    if parts.scheme in ("gs", "gcs"):
        return f"https://console.cloud.google.com/storage/browser/{bucket}/{key}"
    return None
