"""`BatchAssetComponent`: a batch asset in a few lines of YAML, one request for each row of a table.

    table ──▶ reviews_batch ──▶ reviews

A subclass can do what YAML cannot say: override `load_table`, `ask` or `get_asset_spec`.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Self

import dagster as dg
from dagster.components.core.component_tree import TestComponentTree
from pydantic import BaseModel, ConfigDict, Field, model_validator

from anybatch import Report, build_requests
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

from .assets import BatchAssets, build_batch_assets
from .component_scaffolder import BatchScaffolder
from .component_schema import (
    File,
    ResolvedBackfillPolicy,
    ResolvedBody,
    ResolvedModelName,
    ResolvedPartitions,
    ResolvedResource,
    ResolvedRetryPolicy,
    ResolvedTable,
    ResolvedText,
    described,
    described_as_option,
    option_text,
)
from .options import ValueName
from .sensor import build_batch_sensor

_PARTITION = "{partition}"


@dg.scaffold_with(BatchScaffolder)
class BatchAssetComponent(dg.Component, dg.Model, dg.Resolvable):
    """A batch asset: a request to a language model for each row of a table, sent as one batch.

    The table is an upstream asset or a file. The component makes two assets: `<name>_batch` submits the
    batch, and `<name>` holds the results, with a check on the share of rows that have none. No run is alive
    while the batch runs: one sensor for all components of a code location waits for it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    # --- the requests
    name: Annotated[str, described("Name of the result asset.", "review_topics")]
    key_prefix: Annotated[str | list[str] | None, described("Prefix of both assets' keys.")] = None
    table: ResolvedTable = Field(
        description="Asset key of the upstream table, or a file. Whatever its IO manager loads is a table: a "
        "DataFrame, an Arrow table, a list of dicts, the path of a CSV, JSONL or Parquet file.",
        examples=["raw/reviews", {"file": "reviews.csv"}],
    )
    prompt: ResolvedText = Field(
        description=option_text(
            "prompt", "Here a text, or the file that holds it; `{{` and `}}` are braces."
        ),
        examples=["What is this review about? {text}", {"file": "prompt.md"}],
    )
    system: Annotated[
        ResolvedText | None, described_as_option("system", more="Here a text, or the file that holds it.")
    ] = None
    id_column: Annotated[str | None, described_as_option("id_column", "review_id")] = None
    model_name: ResolvedModelName = Field(
        alias="model", description=option_text("model"), examples=["gpt-4o-mini"]
    )
    body: Annotated[ResolvedBody | None, described_as_option("body", {"max_tokens": 200})] = None

    # --- the account
    resource_key: Annotated[str, described("Key of the `BatchResource`.")] = "anybatch"
    resource: Annotated[
        ResolvedResource | None,
        described(
            "The account, defined here as resource `resource_key`; components that define the same one share "
            "it. Left out, it is defined elsewhere in the code location.",
            {"provider": "openai", "api_key": "{{ env.OPENAI_API_KEY }}"},
        ),
    ] = None

    # --- the job
    endpoint: Annotated[str, described_as_option("endpoint")] = "/v1/chat/completions"
    completion_window: Annotated[str, described_as_option("completion_window")] = "24h"
    metadata: Annotated[dict[str, str] | None, described_as_option("metadata")] = None
    options: Annotated[dict[str, Any] | None, described_as_option("options")] = None
    output: Annotated[
        str | None,
        described(
            "Folder or URL under which each job has a folder of its own, for its record and its results; the "
            "resource's if left out."
        ),
    ] = None
    on_orphan: Annotated[OnOrphan, described_as_option("on_orphan")] = "fail"
    on_changed: Annotated[OnChanged, described_as_option("on_changed")] = "cancel_and_resubmit"
    on_untranslatable: Annotated[OnUntranslatable, described_as_option("on_untranslatable")] = "fail"
    on_lost: Annotated[OnLost, described_as_option("on_lost")] = "fail"
    shard_requests: Annotated[int | None, described_as_option("shard_requests", 10_000)] = None
    keep_requests: Annotated[KeepRequests, described_as_option("keep_requests")] = "until_landed"
    max_rounds: Annotated[int, described_as_option("max_rounds", 3)] = 1
    on_partial: Annotated[OnPartial, described_as_option("on_partial")] = "keep"
    max_failed_ratio: Annotated[
        float | None,
        described_as_option("max_failed_ratio", 0.01, more="What fails is the check `error_rate`."),
    ] = None
    timeout: Annotated[float, described_as_option("timeout")] = DEFAULT_TIMEOUT
    on_timeout: Annotated[OnTimeout, described_as_option("on_timeout")] = "leave"
    price: Annotated[tuple[float, float] | None, described_as_option("price", [0.075, 0.3])] = None
    value: Annotated[
        ValueName | type[BaseModel] | Callable[[Report], Any],
        described("Value of the result asset, for the assets downstream.", of=ValueName),
    ] = "path"

    # --- the assets
    partitions_def: Annotated[ResolvedPartitions | None, described("Partitions of both assets.")] = None
    backfill_policy: Annotated[
        ResolvedBackfillPolicy | None, described("How many partitions one run takes, and so one batch.")
    ] = None
    automation_condition: Annotated[
        dg.AutomationCondition[Any] | None,
        described("When to submit.", "{{ dg.AutomationCondition.eager() }}", of=str),
    ] = None
    freshness_policy: Annotated[
        dg.FreshnessPolicy | None, described("Freshness policy of the result asset.", of=str)
    ] = None
    retry_policy: Annotated[ResolvedRetryPolicy | None, described("Retries of both assets' steps.")] = None
    deps: Annotated[list[str] | None, described("Keys of further assets to come after.")] = None
    description: Annotated[str | None, described("Description of the result asset.")] = None
    group_name: Annotated[str | None, described("Group of both assets.")] = None
    tags: Annotated[dict[str, str] | None, described("Tags of both assets.", {"team": "data"})] = None
    owners: Annotated[list[str] | None, described("Owners of both assets.", ["team:data"])] = None
    kinds: Annotated[list[str] | None, described("Kinds of both assets.", ["openai"])] = None
    code_version: Annotated[str | None, described("Version of the prompt and its settings.")] = None
    definition_metadata: Annotated[dict[str, Any] | None, described("Dagster's metadata of both assets.")] = (
        None
    )
    io_manager_key: Annotated[str | None, described("IO manager of the result asset.")] = None
    op_tags: Annotated[dict[str, Any] | None, described("Tags of both assets' ops.")] = None
    pool: Annotated[str | None, described("Concurrency pool of the submit asset.")] = None

    polling_sensor: Annotated[
        bool,
        described(
            "Whether this component may bring the batch sensor: one component does, for all of them. Say "
            "false in each where the code location defines a batch sensor of its own."
        ),
    ] = True

    # --- to override -----------------------------------------------------------------------------------

    def load_table(self, context: dg.AssetExecutionContext, table: Any) -> Any:
        """The table whose rows are asked about; a subclass may filter or join it.

        Args:
            context: Dagster's context of the step.
            table: What was loaded of the upstream asset, or the path of the file; in a run over several
                partitions a mapping from partition key to either.
        """
        return table

    def ask(self, row: Mapping[str, Any]) -> Any:
        """What to ask about a row: a text, messages, or the whole body; by default the filled template."""
        (line,) = self._requests([row])
        return line["body"]

    def get_asset_spec(self, spec: dg.AssetSpec) -> dg.AssetSpec:
        """The spec of each of the two assets; a subclass may change all of it but the key."""
        return spec

    # --- the definitions -------------------------------------------------------------------------------

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        family = self._family(context)
        return dg.Definitions(
            assets=[assets.map_asset_specs(self.get_asset_spec) for assets in self._batch_assets()],
            sensors=self._sensors(family),
            resources=self._resources(family),
        )

    def _family(self, context: dg.ComponentLoadContext) -> Sequence["BatchAssetComponent"]:
        """All components of this kind in the code location."""
        tree = context.component_tree
        # Without a project Dagster passes a stand-in, which would search the current folder.
        alone = isinstance(tree, TestComponentTree)
        family = [] if alone else tree.get_all_components(BatchAssetComponent)
        # The tree leaves out a component that a function without a return annotation returns.
        return family if any(component is self for component in family) else [*family, self]

    def _sensors(self, family: Iterable["BatchAssetComponent"]) -> list[dg.SensorDefinition]:
        """The batch sensor, if this is the first component that may bring it: two would start runs twice."""
        if next((component for component in family if component.polling_sensor), None) is not self:
            return []
        return [build_batch_sensor(resource_keys=sorted({component.resource_key for component in family}))]

    def _resources(self, family: Iterable["BatchAssetComponent"]) -> dict[str, Any]:
        """The resource. Of several equal ones the first: definitions merge only if it is the same object."""
        for other in family:
            if self.resource is None or other.resource is None or other.resource_key != self.resource_key:
                continue
            if other.resource != self.resource:
                raise dg.DagsterInvalidDefinitionError(
                    f"resource: {self.name} and {other.name} define the resource {self.resource_key!r} "
                    "differently; give one of them another resource_key"
                )
            return {self.resource_key: other.resource}
        return {}

    def _batch_assets(self) -> BatchAssets:
        def from_asset(context: dg.AssetExecutionContext, table: Any) -> Any:
            return self.load_table(context, table)

        def from_file(context: dg.AssetExecutionContext) -> Any:
            return self.load_table(context, self._files(context))

        source = self.table.file.rpartition("/")[2] if isinstance(self.table, File) else self.table
        options: dict[str, Any] = {name: getattr(self, name) for name in _OPTIONS}
        options |= {
            "model": self.model_name,
            "kinds": set(self.kinds or ()),
            "description": self.description or f"`{self.model_name}`, asked about each row of `{source}`.",
        }
        if type(self).ask is not BatchAssetComponent.ask:
            options["prompt"] = self.ask
        if isinstance(self.table, File):
            return build_batch_assets(from_file, **options)
        ins = {"table": dg.AssetIn(key=dg.AssetKey.from_user_string(source))}
        return build_batch_assets(from_asset, ins=ins, **options)

    def _files(self, context: dg.AssetExecutionContext) -> str | dict[str, str]:
        """The path of the table, or a path for each partition of the run."""
        assert isinstance(self.table, File)
        path = self.table.file
        if _PARTITION not in path:
            return path
        return {key: path.replace(_PARTITION, key) for key in context.partition_keys}

    def _requests(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The requests of these rows; raises at once if the template cannot be right."""
        return build_requests(
            rows,
            self.prompt,
            model=self.model_name,
            id_column=self.id_column,
            endpoint=self.endpoint,
            system=self.system,
            **(self.body or {}),
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if type(self).ask is BatchAssetComponent.ask:
            self._requests(())
        if isinstance(self.table, File) and _PARTITION in self.table.file and self.partitions_def is None:
            raise ValueError(f"table.file: {_PARTITION} in the path needs a partitions_def")
        return self


# The fields that go to `build_batch_assets` unchanged.
_OPTIONS = BatchAssetComponent.model_fields.keys() & inspect.signature(build_batch_assets).parameters.keys()
