"""What operators and sensors share: their account, their identity, how they wait and how they fail."""

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


class OnAccount:
    """The arguments by which a task names its account: `conn_id`, `provider`, `api_base`."""

    conn_id: str | None
    provider: str | None
    api_base: str | None
    min_defer_seconds: float | None

    @property
    def effective_conn_id(self) -> str | None:
        """The connection's id: `anybatch_default` where nothing is given, None where `provider` is enough."""
        return self.conn_id or (None if self.provider else "anybatch_default")

    def hook(self) -> AnyBatchHook:
        from anybatch_airflow.hooks import AnyBatchHook

        return AnyBatchHook(self.effective_conn_id, provider=self.provider, api_base=self.api_base)

    def trigger(
        self, batches: Mapping[str, int | None], deadlines: Mapping[str, float], **kwargs: Any
    ) -> AnyBatchTrigger:
        """The trigger that waits for these batches (id -> creation time)."""
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
    """Whether to wait without a worker slot, which is the point here: None means yes.

    Only the environment variable turns it off. `default_deferrable = false` in airflow.cfg is nobody's wish:
    Airflow writes that file by itself at its first start, with the value of every option in it.
    """
    if deferrable is not None:
        return deferrable
    is_set = "AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE" in os.environ
    return conf.getboolean("operators", "default_deferrable") if is_set else True


def checked(event: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A trigger's event, of batches that have ended or are late; raises AirflowException for any other."""
    from anybatch_airflow.triggers import ERROR

    if not event or "status" not in event:
        raise AirflowException(f"the trigger sent no event that this version understands: {event!r}")
    if event["status"] == ERROR:
        raise (AirflowFailException if event.get("final") else AirflowException)(event["message"])
    return event


def task_instance(context: Context) -> Any:
    return context["ti"]  # pyright: ignore[reportTypedDictNotRequiredAccess]  there is one in every task


def job_id(ti: Any) -> str:
    """The identity of a task instance's job, the same for each of its attempts.

    With the option `[anybatch] deployment` it begins with that: two deployments of the same DAGs, such as
    staging and production, may have the same runs.
    """
    deployment = conf.get("anybatch", "deployment", fallback="")
    parts = [deployment] if deployment else []
    parts += [ti.dag_id, ti.task_id, ti.run_id]
    if ti.map_index >= 0:
        parts.append(str(ti.map_index))
    return "airflow:" + "/".join(parts)


@contextmanager
def final_errors() -> Iterator[None]:
    """Errors that a retry cannot cure fail the task at once; a person has to change something first."""
    from anybatch.errors import AnyBatchError, classify

    try:
        yield
    except AnyBatchError as error:
        if not classify(error).is_final:
            raise
        raise AirflowFailException(f"{type(error).__name__}: {error}") from error
