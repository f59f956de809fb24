"""The parts of a component's YAML that are more than text and numbers, and how they are read."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import dagster as dg
from dagster.components import ResolutionContext
from dagster.components.resolved.core_models import (
    DailyPartitionsDefinitionModel,
    HourlyPartitionsDefinitionModel,
    MultiRunBackfillPolicyModel,
    SingleRunBackfillPolicyModel,
    StaticPartitionsDefinitionModel,
    TimeWindowPartitionsDefinitionModel,
    WeeklyPartitionsDefinitionModel,
    resolve_backfill_policy,
    resolve_partitions_def,
)
from pydantic import Field
from upath import UPath

from anybatch import LLMProvider
from anybatch.jobs.options import option
from anybatch.providers import get_provider, provider_names

from .resource import BatchResource

_ENV = re.compile(r"""\{\{\s*env(?:\.(\w+)|\(\s*['"](\w+)['"]\s*\))\s*\}\}""")


def described(description: str, *examples: Any, of: Any = None) -> dg.Resolver:
    """A field's description for the component's documentation.

    Not a pydantic `Field`: for one with a default, the schema that Dagster derives would lose the
    description.

    Args:
        description: The description.
        *examples: Values for the documentation.
        of: The field's type in YAML, if it differs.
    """
    resolver: dg.Resolver = dg.Resolver.default(
        description=description, examples=list(examples) or None, model_field_type=of
    )
    return resolver


def described_as_option(name: str, *examples: Any, more: str = "", of: Any = None) -> dg.Resolver:
    """The same for a field that is an option of a job: the option's own sentence, and `more`."""
    return described(option_text(name, more), *examples, of=of)


def option_text(name: str, more: str = "") -> str:
    return f"{option(name).text} {more}".rstrip()


class File(dg.Model):
    """A file beside the component's YAML, or anywhere by its URL."""

    file: str = Field(
        description="A path, relative to the component's folder, or an fsspec URL. In the path of a table"
        " `{partition}` stands for the partition key.",
        examples=["reviews.csv", "s3://bucket/reviews/{partition}.parquet"],
    )


class BatchResourceModel(dg.Model):
    """A `BatchResource` in YAML: the fields are its own."""

    provider: str = Field(
        description="Name of the provider, such as `openai`, `anthropic` or `local`.", examples=["openai"]
    )
    api_key: str | None = Field(
        default=None,
        description="The variable that holds the key, as a template; the provider's own if left out.",
        examples=["{{ env.OPENAI_API_KEY }}"],
    )
    api_base: str | None = Field(default=None, description="Base URL, where it is not the provider's usual.")
    client_args: dict[str, Any] = Field(
        default={}, description="Arguments for the HTTP client: timeout, proxy, verify, headers."
    )
    settings: dict[str, Any] = Field(
        default={},
        description="What the provider's account has besides key and base URL, by name; a secret one as a"
        " template that reads a variable.",
        examples=[{"region": "eu-west-1"}],
    )
    output: str | None = Field(
        default=None, description="Folder or fsspec URL under which each batch asset keeps its job folders."
    )
    max_in_flight: int | None = Field(
        default=None, description="How many batches may be in flight on the account; further runs wait."
    )


class RetryPolicyModel(dg.Model):
    """A `dagster.RetryPolicy` in YAML."""

    max_retries: int = 1
    delay: float | None = Field(default=None, description="Seconds between two tries.")


def resolve_table(context: ResolutionContext, table: str | File) -> str | File:
    """The asset key as it is, or the file's full path."""
    return File(file=_located(context, table)) if isinstance(table, File) else table


def resolve_text(context: ResolutionContext, text: str | File) -> str:
    """The text as it is, or what its file holds; braces in a prompt are never Jinja's."""
    return UPath(_located(context, text)).read_text(encoding="utf-8") if isinstance(text, File) else text


def _located(context: ResolutionContext, file: File) -> str:
    path = str(context.at_path("file").resolve_value(file.file))
    return path if "://" in path else str(context.resolve_source_relative_path(path))


def resolve_resource(context: ResolutionContext, model: BatchResourceModel) -> BatchResource:
    given = model.model_dump(exclude_unset=True)
    key = given.pop("api_key", None)
    settings = context.resolve_value(given)
    name = settings["provider"]
    if (
        name not in set(LLMProvider) and name not in provider_names()
    ):  # provider_names() reads all packages' entry points
        get_provider(name)  # raises; its error names the providers that exist
    return BatchResource(**settings, api_key=_key(context, key) if key else None)


def _key(context: ResolutionContext, template: str) -> str:
    """An environment variable stays a variable: Dagster shows its name, and reads its value when needed."""
    if variable := _ENV.fullmatch(template.strip()):
        return dg.EnvVar(variable[1] or variable[2])
    if "{{" in template:
        return context.resolve_value(template, as_type=str)
    raise ValueError(
        'api_key: a key does not belong in this file; write "{{ env.NAME }}", where NAME is the environment '
        "variable that holds it"
    )


def resolve_retry_policy(context: ResolutionContext, model: RetryPolicyModel) -> dg.RetryPolicy:
    return dg.RetryPolicy(**context.resolve_value(model.model_dump()))


def resolve_body(context: ResolutionContext, body: Any) -> Any:
    """The body with its templates rendered; everything else stays as it is.

    Dagster would render every text, and "1" would become a number.
    """
    if isinstance(body, Mapping):
        return {name: resolve_body(context.at_path(name), value) for name, value in body.items()}
    if isinstance(body, list):
        return [resolve_body(context.at_path(place), value) for place, value in enumerate(body)]
    return context.resolve_value(body) if isinstance(body, str) and "{{" in body else body


_PartitionsModel = (
    HourlyPartitionsDefinitionModel
    | DailyPartitionsDefinitionModel
    | WeeklyPartitionsDefinitionModel
    | TimeWindowPartitionsDefinitionModel
    | StaticPartitionsDefinitionModel
)
_BackfillModel = SingleRunBackfillPolicyModel | MultiRunBackfillPolicyModel

ResolvedTable = Annotated[str | File, dg.Resolver(resolve_table, model_field_type=str | File)]
ResolvedText = Annotated[
    str, dg.Resolver(resolve_text, model_field_type=str | File, inject_before_resolve=False)
]
# `model` is a method of every resolvable class, so the attribute has another name than the field.
ResolvedModelName = Annotated[
    str, dg.Resolver(lambda _, name: name, model_field_name="model", model_field_type=str)
]
ResolvedBody = Annotated[dict[str, Any], dg.Resolver(resolve_body, model_field_type=dict[str, Any])]
ResolvedResource = Annotated[
    BatchResource, dg.Resolver(resolve_resource, model_field_type=BatchResourceModel)
]
ResolvedRetryPolicy = Annotated[
    dg.RetryPolicy, dg.Resolver(resolve_retry_policy, model_field_type=RetryPolicyModel)
]
ResolvedPartitions = Annotated[
    dg.PartitionsDefinition[Any], dg.Resolver(resolve_partitions_def, model_field_type=_PartitionsModel)
]
ResolvedBackfillPolicy = Annotated[
    dg.BackfillPolicy, dg.Resolver(resolve_backfill_policy, model_field_type=_BackfillModel)
]
