"""The buttons on a task instance: its batches at the provider, its results where they landed.

An operator has both with `operator_extra_links = (BatchLink(), ResultsLink())` and, right after submitting,

    push_links(ti, batches=hook.console_url(client, batch_ids), results=job_folder)

which pushes two XComs, `batch_url` and `results_url`, each the whole URL or "" where there is no page to
show. The API server reads these and nothing else: neither the DAG file nor this package is imported there.
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
    """A link that the operator pushed as an XCom."""

    label: ClassVar[str]
    key: ClassVar[str]

    @property
    def name(self) -> str:
        return self.label

    @property
    def xcom_key(self) -> str:
        return self.key

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """What was pushed; Airflow asks at the end of every run of the task and stores the answer again."""
        ti: Any = ti_key  # on a worker it is the running task instance
        if (pushed := _pushed.get(_key(ti))) is not None:
            return pushed[self.key]
        context = getattr(ti, "_ti_context_from_server", None)
        if context is not None and getattr(context, "next_method", None) is None:
            return ""  # the task ended before it had a batch; asking would only log an error
        # A run that resumed after a deferral and failed at once knows no more than its predecessor.
        from airflow.providers.common.compat.sdk import XCom

        return str(XCom.get_value(ti_key=ti, key=self.key) or "")


class BatchLink(_PushedLink):
    """The provider's page of the batch, or of all batches where a job has several."""

    label = "Batch at the provider"
    key = BATCH_URL


class ResultsLink(_PushedLink):
    """The page of the object store that shows the results."""

    label = "Results"
    key = RESULTS_URL


_pushed: dict[tuple[str, str, str, int], dict[str, str]] = {}
"""What this process has pushed, by task instance; a worker's process runs one."""


def push_links(ti: Any, *, batches: str | None, results: object = None) -> None:
    """Push what the two links show: `batches` is a URL, `results` the path or URL of the job's folder."""
    links = {BATCH_URL: batches or "", RESULTS_URL: (results_url(str(results)) if results else None) or ""}
    _pushed[_key(ti)] = links
    for key, url in links.items():
        ti.xcom_push(key=key, value=url)


def _key(ti: Any) -> tuple[str, str, str, int]:
    return ti.dag_id, ti.task_id, ti.run_id, ti.map_index


def results_url(location: str) -> str | None:
    """The web page of a folder on an object store; None where a browser cannot show it."""
    parts = urlsplit(location)
    bucket, key = parts.netloc.rpartition("@")[2], quote(parts.path.strip("/"))
    if parts.scheme in ("http", "https"):
        return location
    if parts.scheme in ("s3", "s3a"):
        return f"https://s3.console.aws.amazon.com/s3/buckets/{bucket}?prefix={key}/"
    if parts.scheme in ("gs", "gcs"):
        return f"https://console.cloud.google.com/storage/browser/{bucket}/{key}"
    return None
