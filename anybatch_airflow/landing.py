"""What a task does once results have landed: it reports them, and fails if too many rows lack a result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from airflow.providers.common.compat.sdk import AirflowFailException, Asset

from anybatch_airflow.base import task_instance
from anybatch_airflow.lineage import report_lineage
from anybatch_airflow.reporting import manifest_of, report_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Report
    from anybatch.jobs.options import OnPartial
    from anybatch_airflow.hooks import AnyBatchHook

_MAX_NAMED = 5  # rows without a result that an error message names


class LandingOperator(Protocol):
    """The attributes of an operator that `land` uses."""

    on_partial: OnPartial
    max_failed_ratio: float | None
    manifest: dict[str, Any] | None
    outlets: list[Any]

    @property
    def log(self) -> Any: ...
    def hook(self) -> AnyBatchHook: ...


def land(
    operator: LandingOperator, context: Context, report: Report, *, source: object = None
) -> dict[str, Any]:
    """Report landed results to lineage and assets, and return their manifest.

    Args:
        operator: The operator that landed them.
        context: Airflow's context of the running task.
        report: What the job or the batches came to.
        source: The path that the requests came from, None if they came from memory.

    Returns:
        The manifest, which is the task's XCom.

    Raises:
        AirflowFailException: More rows lack a result than `on_partial` and `max_failed_ratio` accept. The
            results have landed all the same.
    """
    from anybatch.jobs.policies import rows_problem

    operator.manifest = manifest = manifest_of(report)
    operator.log.info("%s; results in %s", report_text(report), report.results)
    report_lineage(operator.hook(), source, manifest)
    if problem := rows_problem(report, operator.on_partial, operator.max_failed_ratio):
        # A failed task returns nothing, but a task that runs after it (trigger_rule) may need the manifest.
        task_instance(context).xcom_push(key="return_value", value=manifest)
        # No retry: it would read the same report.
        examples = _first_rows_without_result(report)
        raise AirflowFailException(f"{problem}; results in {report.results}; {examples}")
    _add_to_asset_events(context, operator.outlets, manifest)
    return manifest


def _add_to_asset_events(
    context: Mapping[str, Any] | Context, outlets: Iterable[Any], manifest: dict[str, Any]
) -> None:
    """Put the manifest into the `extra` of the outlets' events, for DAGs that these assets schedule."""
    events = context.get("outlet_events")
    for outlet in outlets:
        if events is not None and isinstance(outlet, Asset):
            events[outlet].extra.update(manifest)


def _first_rows_without_result(report: Report) -> str:
    """The custom_ids, outcomes and error codes of the first rows that have no result."""
    from anybatch import read_results
    from anybatch.paths import open_path
    from anybatch_airflow.inputs import location

    names = []
    for row in read_results(open_path(location(report.results))):
        if row.outcome != "succeeded":
            code = f" ({row.error.code})" if row.error and row.error.code else ""
            names.append(f"{row.custom_id!r} {row.outcome.value}{code}")
            if len(names) == _MAX_NAMED:
                break
    return "the first of them: " + "; ".join(names)
