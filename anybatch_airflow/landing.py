"""What an operator does once results have landed: tell everyone, and judge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from airflow.providers.common.compat.sdk import AirflowFailException, Asset

from anybatch_airflow.account import task_instance
from anybatch_airflow.lineage import report_lineage
from anybatch_airflow.policies import manifest_of, told

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Report
    from anybatch.jobs.options import OnPartial
    from anybatch_airflow.hooks import AnyBatchHook

_NAMED = 5  # rows without a result that an error names


class Lander(Protocol):
    """What is used of an operator that lands results."""

    on_partial: OnPartial
    max_failed_ratio: float | None
    manifest: dict[str, Any] | None
    outlets: list[Any]

    @property
    def log(self) -> Any: ...
    def hook(self) -> AnyBatchHook: ...


def land(operator: Lander, context: Context, report: Report, *, source: object = None) -> dict[str, Any]:
    """Tell lineage and assets of landed results, and return their manifest; fail where too many rows failed.

    `source` is the path the requests came from, if there is one.
    """
    from anybatch.jobs.policies import rows_problem

    operator.manifest = manifest = manifest_of(report)
    operator.log.info("%s; results in %s", told(report), report.results)
    report_lineage(operator.hook(), source, manifest)
    if problem := rows_problem(report, operator.on_partial, operator.max_failed_ratio):
        # A task that fails returns nothing, yet one that runs after it all the same may want to know.
        task_instance(context).xcom_push(key="return_value", value=manifest)
        # The results are final: a retry would read the same report.
        raise AirflowFailException(f"{problem}; results in {report.results}; {_without_result(report)}")
    _tell_assets(context, operator.outlets, manifest)
    return manifest


def _tell_assets(
    context: Mapping[str, Any] | Context, outlets: Iterable[Any], manifest: dict[str, Any]
) -> None:
    """Whoever is scheduled by an outlet asset finds the manifest in the event's `extra`."""
    events = context.get("outlet_events")
    for outlet in outlets:
        if events is not None and isinstance(outlet, Asset):
            events[outlet].extra.update(manifest)


def _without_result(report: Report) -> str:
    """The first rows that have none, by name."""
    from anybatch import read_results
    from anybatch.paths import open_path
    from anybatch_airflow.inputs import location

    names = []
    for row in read_results(open_path(location(report.results))):
        if row.outcome != "succeeded":
            code = f" ({row.error.code})" if row.error and row.error.code else ""
            names.append(f"{row.custom_id!r} {row.outcome.value}{code}")
            if len(names) == _NAMED:
                break
    return "the first of them: " + "; ".join(names)
