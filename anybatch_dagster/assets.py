"""`@batch_asset`: a function that yields requests becomes two assets and a check.

    upstream ──▶ reviews_batch ──▶ reviews ──▶ downstream
                 submits, ends     lands the results, carries the check `error_rate`

No run is alive in between: where the batch has not ended, `reviews` yields nothing, and the batch sensor
starts it again, together with everything downstream that the same run was asked for.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import dagster as dg
from dagster._utils.warnings import disable_dagster_warnings

from .resource import BatchResource
from .steps import CHECK, JobOptions, Value, collect_results, submit_requests
from .submissions import RESULT, ROLE, SUBMIT

# What a provider may need, beyond its completion window, to write the files of a batch that ended.
_DEFAULT_TIMEOUT = timedelta(hours=26)

Compute: TypeAlias = Callable[..., Any]


class SubmitConfig(dg.Config):
    """Run config of a submit asset; a function's own config class may inherit from it."""

    force: bool = False
    """Submit again although the same requests were submitted before; what still runs of them is cancelled."""


class BatchAssets(list[dg.AssetsDefinition]):
    """The two assets of a `@batch_asset`: `dg.Definitions(assets=[*reviews])`.

    It is a list because Dagster's module loaders look into lists, and into no other sequence.
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


def batch_asset(
    *,
    name: str | None = None,
    key_prefix: str | Sequence[str] | None = None,
    resource_key: str = "anybatch",
    model: str | None = None,
    endpoint: str = "/v1/chat/completions",
    completion_window: str = "24h",
    metadata: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    output: str | None = None,
    on_orphan: Literal["fail", "resubmit"] = "fail",
    on_changed: Literal["cancel_and_resubmit", "fail"] = "cancel_and_resubmit",
    on_untranslatable: Literal["fail", "drop"] = "fail",
    max_rounds: int = 1,
    max_failed_ratio: float | None = None,
    timeout: float | timedelta = _DEFAULT_TIMEOUT,
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
) -> Callable[[Compute], BatchAssets]:
    """Make a function that yields request lines into a submit asset, a result asset and a check.

    The function is written as for `@dg.asset`: upstream assets, resources, `config` and `context` are
    arguments. It yields request dicts, or returns an iterable of them or the path of a JSONL file.

    The job's identity is asset and partition: materializing again with the same requests finds the same
    batch, or the landed results, and costs nothing. `SubmitConfig(force=True)` submits again regardless, and
    so does materializing after the batch was cancelled or expired.

    resource_key      key of the `BatchResource`: provider, credentials
    model, endpoint, completion_window, metadata, options, on_orphan, on_changed, on_untranslatable,
    max_rounds, price as in `anybatch.Job`; `metadata` goes to the provider, `definition_metadata` to Dagster
    output            folder or URL under which the job folders lie; default: the resource's
    max_failed_ratio  share of rows without a result above which the check `error_rate` fails; default: it
                      fails if no row succeeded
    timeout           seconds or timedelta from creation on, after which the result asset fails; the batch
                      is left running, and materializing the result asset takes its results
    value             of the result asset: "path" of results.jsonl, "rows" (a list of `anybatch.Row`), "none",
                      or a function of the report. A run over several partitions stores none
    automation_condition, pool  of the submit asset (the sensor starts the result asset)
    freshness_policy, io_manager_key  of the result asset
    """
    job_options = JobOptions(
        resource_key=resource_key,
        model=model,
        endpoint=endpoint,
        completion_window=completion_window,
        metadata=dict(metadata or {}),
        options=dict(options or {}),
        output=output,
        on_orphan=on_orphan,
        on_changed=on_changed,
        on_untranslatable=on_untranslatable,
        max_rounds=max_rounds,
        max_failed_ratio=max_failed_ratio,
        timeout=timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout),
        price=price,
        value=value,
    )
    both: dict[str, Any] = {
        "partitions_def": partitions_def,
        "backfill_policy": backfill_policy,
        "retry_policy": retry_policy,
        "op_tags": op_tags,
        "group_name": group_name,
    }
    spec: dict[str, Any] = {
        "code_version": code_version,
        "owners": owners,
        "kinds": kinds or {"anybatch"},
        "metadata": definition_metadata,
    }

    def decorate(fn: Compute) -> BatchAssets:
        path = [*([key_prefix] if isinstance(key_prefix, str) else key_prefix or ()), name or fn.__name__]
        told = description or inspect.getdoc(fn) or ""
        submit_key, result_key = dg.AssetKey([*path[:-1], f"{path[-1]}_batch"]), dg.AssetKey(path)
        with disable_dagster_warnings():  # backfill_policy is called beta, and is the user's own choice
            submit = dg.asset(
                key=submit_key,
                ins=ins,
                deps=deps,
                automation_condition=automation_condition,
                pool=pool,
                description=f"Submits the requests of `{path[-1]}`. {told}".strip(),
                tags={**(tags or {}), ROLE: SUBMIT},
                **both,
                **spec,
            )(_submit_function(fn, job_options))
            check = dg.AssetCheckSpec(CHECK, asset=result_key, description=_check_text(max_failed_ratio))
            out = dg.AssetOut(
                key=result_key,
                is_required=False,  # the batch may not have ended
                io_manager_key=io_manager_key,
                description=told or None,
                tags={**(tags or {}), ROLE: RESULT},
                freshness_policy=freshness_policy,
                **spec,
            )
            result = dg.multi_asset(
                name="__".join(path),
                outs={path[-1]: out},
                deps=[submit_key],
                check_specs=[check],
                required_resource_keys={resource_key},
                can_subset=True,  # which also makes the check's output optional
                **both,
            )(_collect_function(job_options))
        return BatchAssets([submit, result])

    return decorate


def _check_text(max_failed_ratio: float | None) -> str:
    if max_failed_ratio is None:
        return "Some row succeeded."
    return f"At most {max_failed_ratio:.2%} of the rows have no result."


# --- the two functions ---------------------------------------------------------------------------------


def _submit_function(fn: Compute, job_options: JobOptions) -> Compute:
    """The function with `context` and `config` arguments, which submits what the user's one yields.

    Annotations are resolved here, so that `from __future__ import annotations` does no harm in the user's
    module: Dagster alone would take a `dg.Config` or resource argument for an upstream asset there.
    """
    try:
        signature = inspect.signature(fn, eval_str=True)
    except NameError:  # a name for type checkers only; Dagster's own message explains it
        signature = inspect.signature(fn)
    own = list(signature.parameters.values())
    takes_context = bool(own) and own[0].name in ("context", "_context", "context_", "_")
    takes_config = "config" in signature.parameters
    takes_resource = job_options.resource_key in signature.parameters

    def submit(context: dg.AssetExecutionContext, **arguments: Any) -> dg.MaterializeResult[Any]:
        config = arguments["config"] if takes_config else arguments.pop("config")
        name = job_options.resource_key
        resource = arguments[name] if takes_resource else arguments.pop(name)
        requests = fn(context, **arguments) if takes_context else fn(**arguments)
        return submit_requests(
            context, job_options, resource, requests, force=getattr(config, "force", False)
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


def _collect_function(job_options: JobOptions) -> Compute:
    def collect(context: dg.AssetExecutionContext) -> Iterator[Any]:
        yield from collect_results(context, job_options)

    return collect
