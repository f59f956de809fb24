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


# Airflow's own classes declare `template_fields` as two types, and wrap `execute` for assets and outputs.
class _AnyBatchDecoratedOperator(DecoratedOperator, AnyBatchOperator):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """An `AnyBatchOperator` whose input is made by a function, anew in every attempt.

    What the function returns goes nowhere but into the batch: XCom gets the manifest.
    """

    # The arguments of the function are rendered, its requests never are.
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
            input=(),  # made in `execute`
            **kwargs,
        )

    def execute(self, context: Context) -> Any:
        """As `AnyBatchOperator`, with what the function returns as input."""
        # First: an argument that is given by its place must not be found in the context as well.
        self._arguments = determine_kwargs(
            self.python_callable, self.op_args, {**context, **dict(self.op_kwargs)}
        )
        self._name_arguments(context)
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any] | None = None) -> dict[str, Any]:
        """As `AnyBatchOperator`; the function is not called again."""
        # Airflow's own `execute` takes assets among the arguments for inlets, and is not called here.
        given = (*self.op_args, *self.op_kwargs.values())
        self.inlets.extend(one for one in given if isinstance(one, Asset))
        self._name_arguments(context)
        return super().execute_complete(context, event)

    def _name_arguments(self, context: Context) -> None:
        """Put the function's arguments into the context by name.

        Airflow renders `map_index_template` at the end of every stretch on a worker, also where the function
        was called in another one: a name that is missing there would fail a task whose results have landed.
        """
        by_place = inspect.signature(self.python_callable).bind_partial(*self.op_args).arguments
        context_merge(context, {name: value for name, value in by_place.items() if name not in context})
        context_merge(context, self.op_kwargs)

    def _requests(self, context: Context) -> Any:
        """Call the function; then as `AnyBatchOperator`."""
        requests = self.python_callable(*self.op_args, **self._arguments)
        if requests is None:
            raise AirflowFailException(  # as it will return nothing in a retry
                f"{self.python_callable.__qualname__}() returned None; it returns requests (a list or an "
                "iterator), a path or URL, or a table"
            )
        self.input = requests
        return super()._requests(context)


def anybatch_task(
    python_callable: Callable[..., Any] | None = None,
    multiple_outputs: bool | None = None,
    **kwargs: Any,
) -> TaskDecorator:
    """Turn a function that returns requests into a task that submits, waits and lands.

    The function returns a list or an iterator of requests, the path or URL of a file, or, with `prompt=…`, a
    table. `kwargs` are those of `AnyBatchOperator`, without `input`, and `help()` lists them; with
    `multiple_outputs` each member of the manifest is an XCom of its own as well.
    """
    return task_decorator_factory(
        python_callable=python_callable,
        # The function's return annotation speaks of requests, so it says nothing of what is pushed.
        multiple_outputs=bool(multiple_outputs),
        decorated_operator_class=_AnyBatchDecoratedOperator,
        **kwargs,
    )


def _with_options_of_the_operator() -> inspect.Signature:
    """The decorator's own two arguments, and those of `AnyBatchOperator` without `input`."""
    own = [one for one in inspect.signature(anybatch_task).parameters.values() if one.name != "kwargs"]
    options = inspect.signature(AnyBatchOperator.__init__).parameters
    theirs = [one for name, one in options.items() if name not in ("self", "input")]
    return inspect.Signature([*own, *theirs], return_annotation="TaskDecorator")


anybatch_task.__signature__ = _with_options_of_the_operator()  # type: ignore[attr-defined]
