"""`@batch_asset`: a function that yields requests becomes two assets and a check.

    upstream ──▶ reviews_batch ──▶ reviews ──▶ downstream
                 submits, ends     lands the results, carries the check `error_rate`

No run is alive in between. While the batch runs, `reviews` yields nothing, and a second run waits in the
queue: for `reviews`, and for everything downstream that the first run should have materialized.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, TypeAlias

import dagster as dg
from dagster._utils.warnings import disable_dagster_warnings

from anybatch.jobs.options import (
    DEFAULT_TIMEOUT,
    KeepRequests,
    OnChanged,
    OnLost,
    OnOrphan,
    OnPartial,
    OnTimeout,
    OnUntranslatable,
)

from .collect_step import CHECK, collect_results
from .options import IdColumn, JobOptions, Prompt, Value
from .resource import BatchResource
from .submissions import RESULT, ROLE, SUBMIT
from .submit_step import submit_requests

Compute: TypeAlias = Callable[..., Any]
P = ParamSpec("P")


class SubmitConfig(dg.Config):
    """Run config of a submit asset; a function's own config class may inherit from it."""

    force: bool = False
    """Submit all requests again, although they were submitted before; batches that still run are cancelled.

    A run submits them once: its retries and re-executions find what it submitted.
    """


class BatchAssets(list[dg.AssetsDefinition]):
    """The two assets of a batch asset, to be unpacked: `dg.Definitions(assets=[*reviews])`.

    It is a list because Dagster's module loaders find assets in lists, and in no other kind of sequence.
    """

    @property
    def submit(self) -> dg.AssetsDefinition:
        """The asset that submits: `<name>_batch`."""
        return self[0]

    @property
    def result(self) -> dg.AssetsDefinition:
        """The asset that holds the results; name this one in `deps` and `ins`."""
        return self[1]

    @property
    def key(self) -> dg.AssetKey:
        """The key of the result asset."""
        return self.result.key


def build_batch_assets(
    requests: Compute,
    *,
    name: str | None = None,
    key_prefix: str | Sequence[str] | None = None,
    resource_key: str = "anybatch",
    model: str | None = None,
    endpoint: str = "/v1/chat/completions",
    prompt: Prompt | None = None,
    id_column: IdColumn | None = None,
    system: str | None = None,
    body: Mapping[str, Any] | None = None,
    completion_window: str = "24h",
    metadata: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    output: str | None = None,
    on_orphan: OnOrphan = "fail",
    on_changed: OnChanged = "cancel_and_resubmit",
    on_untranslatable: OnUntranslatable = "fail",
    on_lost: OnLost = "fail",
    shard_requests: int | None = None,
    keep_requests: KeepRequests = "until_landed",
    max_rounds: int = 1,
    on_partial: OnPartial = "keep",
    max_failed_ratio: float | None = None,
    timeout: float | timedelta = DEFAULT_TIMEOUT,
    on_timeout: OnTimeout = "leave",
    price: tuple[float, float] | None = None,
    value: Value = "path",
    partitions_def: dg.PartitionsDefinition[Any] | None = None,
    backfill_policy: dg.BackfillPolicy | None = None,
    ins: Mapping[str, dg.AssetIn] | None = None,
    deps: Iterable[Any] | None = None,
    automation_condition: dg.AutomationCondition[Any] | None = None,
    freshness_policy: dg.FreshnessPolicy | None = None,
    retry_policy: dg.RetryPolicy | None = None,
    code_version: str | None = None,
    description: str | None = None,
    group_name: str | None = None,
    tags: Mapping[str, str] | None = None,
    owners: Sequence[str] | None = None,
    kinds: set[str] | None = None,
    definition_metadata: Mapping[str, Any] | None = None,
    io_manager_key: str | None = None,
    op_tags: Mapping[str, Any] | None = None,
    pool: str | None = None,
) -> BatchAssets:
    """Make a submit asset, a result asset and a check from a function that makes requests.

    The function is written as for `@dg.asset`: upstream assets, resources, `config` and `context` are its
    arguments. It yields request dicts, or returns an iterable of them or the path of a JSONL file; with
    `prompt` it returns a table (a DataFrame, an Arrow table, rows, a path), and each row becomes a request.
    In a run over several partitions it returns a mapping from partition key to requests or table, which is
    also how Dagster loads an upstream asset there.

    The job's identity is asset and partition: materializing again with the same requests finds the same
    batch, or the landed results, and costs nothing. Only rows that were cancelled are submitted again, and
    with `max_rounds` those that expired, went missing or failed in a way that may pass.
    `SubmitConfig(force=True)` submits all of them once more.

    Args:
        requests: The function.
        name: Name of the result asset; the submit asset is `<name>_batch`. Default: the function's name.
        key_prefix: Prefix of both assets' keys.
        resource_key: Key of the `BatchResource`, which has provider and credentials.
        model: As in `anybatch.Job`; with `prompt`, the model of every request.
        endpoint: As in `anybatch.Job`.
        prompt: Makes requests from a table: a template such as "Sum up: {text}", or a function of the row.
        id_column: With `prompt`, the column that holds custom_ids, or a function of the row.
        system: With `prompt`, the system prompt of every request.
        body: With `prompt`, the other parameters of every request, such as `{"max_tokens": 200}`.
        completion_window: As in `anybatch.Job`.
        metadata: Strings on every batch at the provider; Dagster's own is `definition_metadata`.
        options: The provider's own options for creating a batch.
        output: Folder or URL in which each job gets a folder of its own. Default: the resource's.
        on_orphan: As in `anybatch.Job`.
        on_changed: As in `anybatch.Job`.
        on_untranslatable: As in `anybatch.Job`.
        on_lost: As in `anybatch.Job`.
        shard_requests: As in `anybatch.Job`.
        keep_requests: As in `anybatch.Job`.
        max_rounds: How often a row may be submitted, as in `anybatch.Job`. No process is alive between two
            rounds: the run of the result asset submits the next round, and then waits as before.
        on_partial: What to do if rows have no result after the last round. "keep": they land as they are, and
            `max_failed_ratio` decides. "fail": the result asset fails; the results have landed all the same.
        max_failed_ratio: Share of rows without a result above which the check `error_rate` fails. Default: it
            fails if no row succeeded.
        timeout: How long to wait for a round, from its creation, in seconds or as a timedelta; checked when
            the sensor looks.
        on_timeout: What to do with a batch that is late. "leave": the result asset fails, the batch runs on,
            and materializing the result asset later takes its results. "cancel": the result asset fails and
            the batch is cancelled; materializing again keeps the finished rows and submits the rest.
            "land_partial": the batch is cancelled, and what it finished lands; the other rows have the
            outcome `cancelled`.
        price: As in `anybatch.Job`.
        value: What the result asset's IO manager stores: the "path" of results.jsonl, "rows" (a list of
            `anybatch.Row`), "dataframe" (pandas), "arrow", "none", a pydantic model (a dict from custom_id to
            object; an answer that does not fit the model counts as a row without a result), or a function of
            the report. In a run over several partitions each partition has a value.
        partitions_def: Partitions of both assets.
        backfill_policy: How many partitions one run takes, and so one batch.
        ins: As on `@dg.asset`; of the submit asset.
        deps: As on `@dg.asset`; of the submit asset.
        automation_condition: When to submit. (The sensor starts the result asset.)
        freshness_policy: Of the result asset.
        retry_policy: Of both assets' steps.
        code_version: Of both assets.
        description: Of both assets. Default: the function's docstring.
        group_name: Of both assets.
        tags: Of both assets.
        owners: Of both assets.
        kinds: Of both assets. Default: `{"anybatch"}`.
        definition_metadata: Dagster's metadata of both assets.
        io_manager_key: Of the result asset.
        op_tags: Of both assets' ops.
        pool: Concurrency pool of the submit asset.

    Returns:
        The submit asset and the result asset.

    Raises:
        DagsterInvalidDefinitionError: An option has a value that is none of its choices, or options
            contradict each other.
    """
    job_options = JobOptions(
        resource_key=resource_key,
        model=model,
        endpoint=endpoint,
        completion_window=completion_window,
        metadata=dict(metadata or {}),
        options=dict(options or {}),
        output=output,
        prompt=prompt,
        id_column=id_column,
        system=system,
        body=dict(body or {}),
        on_orphan=on_orphan,
        on_changed=on_changed,
        on_untranslatable=on_untranslatable,
        on_lost=on_lost,
        shard_requests=shard_requests,
        keep_requests=keep_requests,
        max_rounds=max_rounds,
        on_partial=on_partial,
        max_failed_ratio=max_failed_ratio,
        timeout=timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout),
        on_timeout=on_timeout,
        price=price,
        value=value,
    )
    path = [*([key_prefix] if isinstance(key_prefix, str) else key_prefix or ()), name or requests.__name__]
    submit_key, result_key = dg.AssetKey([*path[:-1], f"{path[-1]}_batch"]), dg.AssetKey(path)
    text = description or inspect.getdoc(requests) or ""
    both: dict[str, Any] = {
        "partitions_def": partitions_def, "backfill_policy": backfill_policy, "retry_policy": retry_policy,
        "op_tags": op_tags, "group_name": group_name,
    }  # fmt: skip
    spec: dict[str, Any] = {
        "code_version": code_version,
        "owners": owners,
        "kinds": kinds or {"anybatch"},
        "metadata": definition_metadata,
    }
    with disable_dagster_warnings():  # it warns that backfill_policy is beta, which is the user's choice
        submit = dg.asset(
            key=submit_key,
            ins=ins,
            deps=deps,
            automation_condition=automation_condition,
            pool=pool,
            description=f"Submits the requests of `{path[-1]}`. {text}".strip(),
            tags={**(tags or {}), ROLE: SUBMIT},
            output_required=False,  # with max_in_flight, the run may end without submitting
            **both,
            **spec,
        )(_submit_function(requests, job_options))
        out = dg.AssetOut(
            key=result_key,
            is_required=False,  # the batch may not have ended
            io_manager_key=io_manager_key,
            description=text or None,
            tags={**(tags or {}), ROLE: RESULT},
            freshness_policy=freshness_policy,
            **spec,
        )
        result = _result_asset(path, out, submit_key, job_options, both)
    return BatchAssets([submit, result])


def _result_asset(
    path: Sequence[str],
    out: dg.AssetOut,
    submit_key: dg.AssetKey,
    job_options: JobOptions,
    both: Mapping[str, Any],
) -> dg.AssetsDefinition:
    """The result asset. A multi-asset with one asset: only a multi-asset with a check may yield nothing."""
    storage = out.io_manager_key or "io_manager"
    is_stored_by_us = both["partitions_def"] is not None and job_options.value != "none"
    check = dg.AssetCheckSpec(
        CHECK, asset=dg.AssetKey(path), description=_check_text(job_options.max_failed_ratio)
    )
    return dg.multi_asset(
        name="__".join(path),
        outs={path[-1]: out},
        deps=[submit_key],
        check_specs=[check],
        required_resource_keys={job_options.resource_key, *([storage] if is_stored_by_us else [])},
        can_subset=True,  # which also makes the check's output optional
        **both,
    )(_collect_function(job_options, storage))


def _as_decorator(
    build: Callable[Concatenate[Compute, P], BatchAssets],
) -> Callable[P, Callable[[Compute], BatchAssets]]:
    """`build_batch_assets` as a decorator: the options come first, then the function."""

    def decorator(*args: P.args, **options: P.kwargs) -> Callable[[Compute], BatchAssets]:
        return lambda requests: build(requests, *args, **options)

    functools.update_wrapper(decorator, build, assigned=("__module__", "__doc__"))
    signature = inspect.signature(build)
    decorator.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[1:], return_annotation=Callable[[Compute], BatchAssets]
    )
    decorator.__name__ = decorator.__qualname__ = "batch_asset"
    return decorator


batch_asset = _as_decorator(build_batch_assets)


def _check_text(max_failed_ratio: float | None) -> str:
    if max_failed_ratio is None:
        return "Some row succeeded."
    return f"At most {max_failed_ratio:.2%} of the rows have no result."


# --- the two functions ---------------------------------------------------------------------------------


def _submit_function(fn: Compute, job_options: JobOptions) -> Compute:
    """A function for `@dg.asset` that submits what the user's function returns.

    It has the arguments of the user's function, and `context`, `config` and the resource. Annotations are
    resolved here: in a user's module with `from __future__ import annotations`, Dagster would take a
    `dg.Config` or resource argument for an upstream asset.
    """
    try:
        signature = inspect.signature(fn, eval_str=True)
    except NameError:  # imported for type checkers only; Dagster's own error explains it
        signature = inspect.signature(fn)
    own = list(signature.parameters.values())
    takes_context = bool(own) and own[0].name in ("context", "_context", "context_", "_")
    takes_config = "config" in signature.parameters
    takes_resource = job_options.resource_key in signature.parameters

    def submit(context: dg.AssetExecutionContext, **arguments: Any) -> Iterator[dg.MaterializeResult[Any]]:
        config = arguments["config"] if takes_config else arguments.pop("config")
        name = job_options.resource_key
        resource = arguments[name] if takes_resource else arguments.pop(name)
        make = functools.partial(fn, *([context] if takes_context else []), **arguments)
        yield from submit_requests(
            context, job_options, resource, make, force=getattr(config, "force", False)
        )

    def argument(name: str, annotation: type) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)

    parameters = [
        argument("context", dg.AssetExecutionContext),
        *([] if takes_config else [argument("config", SubmitConfig)]),
        *([] if takes_resource else [argument(job_options.resource_key, BatchResource)]),
        *own[1 if takes_context else 0 :],
    ]
    submit.__name__ = submit.__qualname__ = fn.__name__
    submit.__module__, submit.__doc__ = fn.__module__, fn.__doc__
    submit.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    submit.__annotations__ = {
        parameter.name: parameter.annotation
        for parameter in parameters
        if parameter.annotation is not inspect.Parameter.empty
    }
    return submit


def _collect_function(job_options: JobOptions, io_manager_key: str) -> Compute:
    def collect(context: dg.AssetExecutionContext) -> Iterator[Any]:
        yield from collect_results(context, job_options, io_manager_key)

    return collect
