"""`@task.anybatch`: a function that returns requests becomes a task that runs them as batches."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.providers.common.compat.sdk import (
    AirflowFailException,
    Asset,
    DecoratedOperator,
    context_merge,
    determine_kwargs,
    task_decorator_factory,
)

from anybatch_airflow.operators import AnyBatchOperator

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from airflow.providers.common.compat.sdk import Context, TaskDecorator


# Two base classes of Airflow's declare `template_fields` with different types, and wrap `execute`.
class _AnyBatchDecoratedOperator(DecoratedOperator, AnyBatchOperator):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """An `AnyBatchOperator` whose input a function makes. Each attempt calls the function anew.

    The requests that it returns go to the provider only; XCom gets the manifest.
    """

    # Airflow renders the function's arguments. It must never render requests, so `input` is left out.
    template_fields = (
        *DecoratedOperator.template_fields,
        *(name for name in AnyBatchOperator.template_fields if name != "input"),
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {
        **DecoratedOperator.template_fields_renderers,
        **AnyBatchOperator.template_fields_renderers,
    }
    custom_operator_name = "@task.anybatch"
    _arguments: Mapping[str, Any]

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            python_callable=python_callable,
            op_args=op_args,
            op_kwargs=op_kwargs,
            input=(),  # `execute` fills it
            **kwargs,
        )

    def execute(self, context: Context) -> Any:
        """As `AnyBatchOperator.execute`, with what the function returns as input."""
        # Before the arguments go into the context: one given by position would be found there a second time.
        self._arguments = determine_kwargs(
            self.python_callable, self.op_args, {**context, **dict(self.op_kwargs)}
        )
        self._name_arguments(context)
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """As `AnyBatchOperator.execute_complete`; the function is not called again."""
        # The base class's `execute`, which makes inlets of assets among the arguments, is not called here.
        given = (*self.op_args, *self.op_kwargs.values())
        self.inlets.extend(one for one in given if isinstance(one, Asset))
        self._name_arguments(context)
        return super().execute_complete(context, event)

    def _name_arguments(self, context: Context) -> None:
        """Put the function's arguments into the context by name.

        Airflow renders `map_index_template` each time the task ends or defers on a worker, also after the
        wait, when the function is not called. A missing name would fail a task whose results have landed.
        """
        by_place = inspect.signature(self.python_callable).bind_partial(*self.op_args).arguments
        context_merge(context, {name: value for name, value in by_place.items() if name not in context})
        context_merge(context, self.op_kwargs)

    def _requests(self, context: Context) -> Any:
        """Call the function, then go on as `AnyBatchOperator` does."""
        requests = self.python_callable(*self.op_args, **self._arguments)
        if requests is None:
            raise AirflowFailException(  # no retry: the function would return None again
                f"{self.python_callable.__qualname__}() returned None. Let it return requests (a list or "
                "an iterator), a path or URL, or, with `prompt`, a table"
            )
        self.input = requests
        return super()._requests(context)


def anybatch_task(
    python_callable: Callable[..., Any] | None = None,
    multiple_outputs: bool | None = None,
    **kwargs: Any,
) -> TaskDecorator:
    """Turn a function that returns requests into a task that submits them, waits and lands the results.

    Args:
        python_callable: The function. It returns a list or an iterator of requests, the path or URL of a
            file, or, with `prompt=…`, a table.
        multiple_outputs: True to push each member of the manifest as an XCom of its own as well.
        **kwargs: The arguments of `AnyBatchOperator` without `input`; `help()` lists them.
    """
    return task_decorator_factory(
        python_callable=python_callable,
        # Not guessed from the return annotation: that describes requests, while the task pushes a manifest.
        multiple_outputs=bool(multiple_outputs),
        decorated_operator_class=_AnyBatchDecoratedOperator,
        **kwargs,
    )


def _signature_with_operator_options() -> inspect.Signature:
    """The decorator's own arguments, then those of `AnyBatchOperator` without `input`."""
    own = [one for one in inspect.signature(anybatch_task).parameters.values() if one.name != "kwargs"]
    options = inspect.signature(AnyBatchOperator.__init__).parameters
    theirs = [one for name, one in options.items() if name not in ("self", "input")]
    return inspect.Signature([*own, *theirs], return_annotation="TaskDecorator")


anybatch_task.__signature__ = _signature_with_operator_options()  # type: ignore[attr-defined]
