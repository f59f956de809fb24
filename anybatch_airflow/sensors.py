"""AnyBatchSensor: waits for batches that something else created."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import (
    AirflowException,
    AirflowFailException,
    AirflowNotFoundException,
    AirflowSensorTimeout,
    AirflowSkipException,
    BaseSensorOperator,
    PokeReturnValue,
)

from anybatch_airflow.base import (
    HasAccount,
    check_event,
    final_errors_skip_retries,
    task_instance,
    waits_deferred,
)
from anybatch_airflow.inputs import batch_ids
from anybatch_airflow.links import BatchLink, push_links
from anybatch_airflow.reporting import batches_in_words, facts_by_batch, utc

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from airflow.providers.common.compat.sdk import Context

    from anybatch import Batch
    from anybatch_airflow.inputs import BatchIds

_TRIGGER = "anybatch_airflow.triggers.AnyBatchTrigger"


class AnyBatchSensor(HasAccount, BaseSensorOperator):
    """Succeeds when all the batches have ended; returns `{id: {"status", "total", "completed", "failed"}}`.

    It looks at the batches once on the worker; if any still runs, the task defers and holds no slot. The
    batches belong to something else, so ending the sensor never cancels them. An outage of the provider fails
    neither a deferred wait nor a poke. What does end the wait, such as a key that is refused or a batch that
    does not exist, is a skip with `soft_fail` or `never_fail`; with `silent_fail` it is logged, and the
    sensor looks again after `poke_interval`, deferred or not.

    Args:
        batch_id: One id or several; the XCom of another task, or a template.
        conn_id: Airflow connection; may be left out if `provider` is given.
        provider: Overrides the connection's provider, or names the one whose environment variables to use.
        api_base: Overrides the connection's base URL.
        accept: The statuses that count as success; any other end fails the task without a retry.
        deferrable: False to hold the worker slot and poke every `poke_interval` seconds (with
            `mode="reschedule"`, without the slot). None: deferred, unless the environment variable
            AIRFLOW__OPERATORS__DEFAULT_DEFERRABLE is False.
        start_from_trigger: True to wait in the triggerer from the start, without a look on a worker first;
            this saves the start of a worker for batches that take long. The scheduler has to know the
            arguments: literal ids, on Airflow 3.3 also templates such as `{{ params.batch_id }}`. With the
            XCom of another task, and in a mapped sensor, the wait begins on a worker as usual.
        min_defer_seconds: Overrides the option `[anybatch] min_defer_seconds`.
    """

    template_fields: Collection[str] = ("batch_id", "conn_id", "provider", "api_base")
    operator_extra_links = (BatchLink(),)
    ui_color = "#e8eefc"

    def __init__(
        self,
        *,
        batch_id: BatchIds,
        conn_id: str | None = None,
        provider: str | None = None,
        api_base: str | None = None,
        accept: Iterable[str] = ("completed",),
        deferrable: bool | None = None,
        start_from_trigger: bool = False,
        min_defer_seconds: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.batch_id = batch_id
        self.conn_id = conn_id
        self.provider = provider
        self.api_base = api_base
        self.accept = tuple(accept)
        self.deferrable = waits_deferred(deferrable)
        self.min_defer_seconds = min_defer_seconds
        self._has_pushed_links = False
        fields = [getattr(self, name) for name in self.template_fields]
        self.start_from_trigger = (
            start_from_trigger and self.deferrable and can_start_from_trigger(fields, _renders_in_triggerer())
        )
        if self.start_from_trigger:
            self._start_in_triggerer()

    def _start_in_triggerer(self) -> None:
        from airflow.triggers.base import StartTriggerArgs

        batch_id: Any = self.batch_id  # no XComArg gets here: those start on a worker
        self.start_trigger_args = StartTriggerArgs(
            trigger_cls=_TRIGGER,
            trigger_kwargs={
                "batch_id": batch_id if isinstance(batch_id, str) else list(batch_id),
                "conn_id": self.effective_conn_id,
                "provider": self.provider,
                "api_base": self.api_base,
                "min_defer_seconds": 0,  # no executor had this task, so none can still report on it
                "cancel_on_kill": False,
            },
            next_method="execute_complete",
            timeout=timedelta(seconds=self.timeout),
        )

    def execute(self, context: Context) -> Any:
        """Look once; return if all have ended, else defer, or poke if `deferrable` is False."""
        from anybatch import AnyBatchError

        try:
            with final_errors_skip_retries():
                if self.deferrable:
                    return self._look(context, time.time() + self.timeout)
                return super().execute(context)
        except (AirflowFailException, AirflowNotFoundException, AnyBatchError) as error:
            # The base class does this only for a resumed task, and for some errors of a poke.
            if self.soft_fail or self.never_fail:
                raise AirflowSkipException(
                    f"skipped instead of failed, as soft_fail or never_fail says: {error}"
                ) from error
            raise

    def poke(self, context: Context) -> PokeReturnValue:
        """Look at all batches once."""
        from anybatch import AnyBatchError

        try:
            batches = self._retrieve(context)
        except AnyBatchError as error:
            if not may_pass(error):
                raise
            self.log.warning("still waiting: %s", error)
            return PokeReturnValue(is_done=False)
        if not all(batch.status.is_terminal for batch in batches):
            self.log.info("%s", batches_in_words(batches))
            return PokeReturnValue(is_done=False)
        return PokeReturnValue(is_done=True, xcom_value=self._check_ends(facts_by_batch(batches)))

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> Any:
        """Resume after the trigger's event."""
        from anybatch_airflow.triggers import ERROR, TIMEOUT

        if self.start_from_trigger:
            self._link(context)
        if event and event.get("status") == ERROR and self.silent_fail:
            self.log.error("%s", event["message"])
            deadline = float(event.get("then") or time.time() + self.timeout)
            if time.time() < deadline:
                return self._look(context, deadline)
            raise AirflowSensorTimeout(event["message"])
        event = dict(check_event(event))
        if event["status"] == TIMEOUT:
            raise AirflowSensorTimeout(event["message"])
        return self._check_ends(event["batches"])

    def _look(self, context: Context, deadline: float) -> Any:
        """Look once, then return, or defer until `deadline` (unix seconds)."""
        from anybatch import AnyBatchError

        try:
            batches = self._retrieve(context)
        except AnyBatchError as error:
            passes = may_pass(error)
            if not passes and not self.silent_fail:
                raise
            self.log.warning("this look failed; the sensor waits on: %s", error)
            unseen = dict.fromkeys(batch_ids(self.batch_id))
            return self._defer(unseen, deadline, pause=None if passes else self.poke_interval)
        if all(batch.status.is_terminal for batch in batches):
            return self._check_ends(facts_by_batch(batches))
        self.log.info("waiting until %s at the latest: %s", utc(deadline), batches_in_words(batches))
        created = {batch.id: batch.created_at for batch in batches}
        return self._defer(created, deadline)

    def _defer(self, created: Mapping[str, int | None], deadline: float, pause: float | None = None) -> None:
        deadlines = dict.fromkeys(created, deadline)
        # The event brings the deadline back, so that it stays the same if the task defers again.
        trigger = self.trigger(created, deadlines, then=str(deadline), cancel_on_kill=False)
        if pause is not None:
            trigger.min_defer_seconds = pause
        backstop = max(deadline - time.time(), 0) + 600  # 10 minutes after the trigger's own deadline
        self.defer(trigger=trigger, method_name="execute_complete", timeout=timedelta(seconds=backstop))

    def _retrieve(self, context: Context) -> list[Batch]:
        with self.hook().get_client() as client:
            ids = batch_ids(self.batch_id)
            if not self._has_pushed_links:  # once, not at every poke
                push_links(task_instance(context), batches=self.hook().console_url(client, ids))
                self._has_pushed_links = True
            return [client.retrieve(batch_id) for batch_id in ids]

    def _link(self, context: Context) -> None:
        """Push the link, for a task that began in the triggerer."""
        from anybatch import AnyBatchError

        try:
            with self.hook().get_client() as client:
                url = self.hook().console_url(client, batch_ids(self.batch_id))
            push_links(task_instance(context), batches=url)
            self._has_pushed_links = True
        except (
            AnyBatchError,
            AirflowException,
        ) as error:  # the wait itself is over: do not fail for want of a link
            self.log.warning("no link to the batch: %s", error)

    def _check_ends(self, batches: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        ends = {batch_id: facts["status"] for batch_id, facts in batches.items()}
        refused = [f"{batch_id} is {end}" for batch_id, end in ends.items() if end not in self.accept]
        if refused:
            raise AirflowFailException(f"{', '.join(refused)}; this sensor accepts {', '.join(self.accept)}")
        return {batch_id: dict(facts) for batch_id, facts in batches.items()}


def may_pass(error: Exception) -> bool:
    """Whether the next look may work without a person's doing."""
    from anybatch.errors import classify

    return not classify(error).wait.ends


def can_start_from_trigger(fields: Sequence[Any], renders: bool) -> bool:
    """Whether the scheduler can make a trigger from these arguments.

    Args:
        fields: The values of the sensor's template fields.
        renders: Whether the triggerer renders templates, as Airflow 3.3 and later do.
    """
    texts = [text for field in fields if field is not None for text in _texts(field)]
    return all(text is not None and _is_known_in_triggerer(text, renders) for text in texts)


def _is_known_in_triggerer(text: str, renders: bool) -> bool:
    is_template = "{{" in text or "{%" in text
    # The triggerer of Airflow 3.3.2 hangs if a template asks for an XCom.
    return not is_template or (renders and "xcom" not in text)


def _texts(field: Any) -> list[str | None]:
    """The texts in an argument; None for a value that is known only when the task runs."""
    if isinstance(field, str):
        return [field]
    if isinstance(field, (list, tuple)):
        return [one if isinstance(one, str) else None for one in field]
    return [None]


def _renders_in_triggerer() -> bool:
    from airflow.providers.common.compat.version_compat import AIRFLOW_V_3_3_PLUS

    return AIRFLOW_V_3_3_PLUS
