"""What operators and sensors share: their account, their job's identity, how they wait and how they fail."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException, conf

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from airflow.providers.common.compat.sdk import Context

    from anybatch_airflow.hooks import AnyBatchHook
    from anybatch_airflow.triggers import AnyBatchTrigger


class HasAccount:
    """The options by which a task names its account: `conn_id`, `provider`, `api_base`."""

    conn_id: str | None
    provider: str | None
    api_base: str | None
    min_defer_seconds: float | None

    @property
    def effective_conn_id(self) -> str | None:
        """The connection's id: `anybatch_default` unless one is given, None if only `provider` is."""
        return self.conn_id or (None if self.provider else "anybatch_default")

    def hook(self) -> AnyBatchHook:
        """The hook of this task's account."""
        from anybatch_airflow.hooks import AnyBatchHook

        return AnyBatchHook(self.effective_conn_id, provider=self.provider, api_base=self.api_base)

    def trigger(
        self, batches: Mapping[str, int | None], deadlines: Mapping[str, float], **kwargs: Any
    ) -> AnyBatchTrigger:
        """The trigger that waits for these batches.

        Args:
            batches: id -> creation time in unix seconds, None where it is unknown.
            deadlines: id -> unix seconds.
            **kwargs: Further arguments of `AnyBatchTrigger`.
        """
        from anybatch_airflow.triggers import AnyBatchTrigger

        return AnyBatchTrigger(
            batches=batches,
            deadlines=deadlines,
            conn_id=self.effective_conn_id,
            provider=self.provider,
            api_base=self.api_base,
            deferred_at=time.time(),
            min_defer_seconds=self.min_defer_seconds,
            **kwargs,
        )


def waits_deferred(deferrable: bool | None) -> bool:
    """Whether to wait without a worker slot; None means yes, since that is what these operators are for.

    Only the environment variable turns it off, not `default_deferrable = false` in airflow.cfg: Airflow
    itself writes that line at its first start, with the default of every option, so it says nothing about
    what anyone wants.
    """
    if deferrable is not None:
        return deferrable
    is_set = "AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE" in os.environ
    return conf.getboolean("operators", "default_deferrable") if is_set else True


def check_event(event: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The event of a trigger whose batches have all ended or are late.

    Raises:
        AirflowFailException: The trigger reported an error that a retry cannot cure.
        AirflowException: It reported another error, or sent an event that this version does not know.
    """
    from anybatch_airflow.triggers import ERROR

    if not event or "status" not in event:
        raise AirflowException(
            f"the trigger sent an event that this version of anybatch does not understand: {event!r}. "
            "Upgrade anybatch on the workers and the triggerer together; clearing the task finds its batches"
        )
    if event["status"] == ERROR:
        raise (AirflowFailException if event.get("final") else AirflowException)(event["message"])
    return event


def task_instance(context: Context) -> Any:
    """The task instance that runs."""
    return context["ti"]  # pyright: ignore[reportTypedDictNotRequiredAccess]  every task's context has it


def job_id(ti: Any) -> str:
    """The identity of a task instance's job; every attempt has the same one.

    It begins with the option `[anybatch] deployment` if that is set: two deployments of the same DAGs, such
    as staging and production, may have runs with equal ids.
    """
    deployment = conf.get("anybatch", "deployment", fallback="")
    parts = [deployment] if deployment else []
    parts += [ti.dag_id, ti.task_id, ti.run_id]
    if ti.map_index >= 0:
        parts.append(str(ti.map_index))
    return "airflow:" + "/".join(parts)


@contextmanager
def final_errors_skip_retries() -> Iterator[None]:
    """Fail the task without a retry on an error that only a person can mend, such as a refused key."""
    from anybatch.errors import AnyBatchError, classify

    try:
        yield
    except AnyBatchError as error:
        if not classify(error).is_final:
            raise
        raise AirflowFailException(f"{type(error).__name__}: {error}") from error
