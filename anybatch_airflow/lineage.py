"""Reports where a job's rows came from and went to, to Airflow's hook lineage and to OpenLineage.

An operator calls `report_lineage` once its results have landed, and defines

    def get_openlineage_facets_on_complete(self, task_instance):
        return openlineage_facets(self.source, self.manifest)

`source` is what was given as input: a path or URL is a dataset, requests in memory are not. In a deployment
that does not read lineage, each costs one call.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.providers.common.compat.sdk import BaseHook
    from airflow.providers.openlineage.extractors import OperatorLineage

# The members of a manifest that lineage gets: figures and names, no content.
_FACTS = (
    "job", "provider", "endpoint", "models", "rows", "rounds", "counts", "input_tokens", "output_tokens",
    "cost", "batch_ids", "duration_s",
)  # fmt: skip


def report_lineage(hook: BaseHook, source: object, manifest: Mapping[str, Any]) -> None:
    """Report to Airflow's lineage collector what the task read and wrote."""
    from airflow.providers.common.compat.lineage.hook import get_hook_lineage_collector

    collector: Any = get_hook_lineage_collector()  # type: ignore[no-untyped-call]
    if uri := asset_uri(source):
        collector.add_input_asset(hook, uri=uri)
    if uri := asset_uri(manifest.get("results")):
        collector.add_output_asset(hook, uri=uri, asset_extra=_facts(manifest))
    collector.add_extra(hook, "anybatch", _facts(manifest))


def openlineage_facets(
    source: object, manifest: Mapping[str, Any] | None
) -> OperatorLineage[Any, Any] | None:
    """What OpenLineage's listener asks an operator for; None if OpenLineage's provider is not installed."""
    try:
        from airflow.providers.openlineage.extractors import OperatorLineage
    except ImportError:
        return None
    from airflow.providers.common.compat.openlineage.facet import (
        Dataset,
        OutputDataset,
        OutputStatisticsOutputDatasetFacet,
    )

    found: OperatorLineage[Any, Any] = OperatorLineage()
    if name := dataset_name(source):
        found.inputs.append(Dataset(*name))
    if manifest is None:  # the task failed before anything landed
        return found
    if name := dataset_name(manifest.get("results")):
        rows = OutputStatisticsOutputDatasetFacet(rowCount=manifest["rows"])
        found.outputs.append(OutputDataset(*name, outputFacets={"outputStatistics": rows}))
    facts = _facts(manifest)
    found.run_facets["anybatch"] = _run_facet()(**{_camel(name): value for name, value in facts.items()})
    return found


def asset_uri(location: object) -> str | None:
    """A path or URL as the URI of an asset, without the Airflow connection that it may name; else None."""
    # Ask the class: an instance would open its file system to answer.
    if not isinstance(location, (str, os.PathLike)) and not hasattr(type(location), "fs"):
        return None
    text = str(location)
    if "://" not in text:
        return "file://" + quote(os.path.abspath(text))
    parts = urlsplit(text)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def dataset_name(location: object) -> tuple[str, str] | None:
    """The namespace and name that OpenLineage's naming rules give a path or URL."""
    uri = asset_uri(location)
    if uri is None:
        return None
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return "file", unquote(parts.path)
    return f"{parts.scheme}://{parts.netloc}", parts.path.strip("/") or "/"


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: manifest[name] for name in _FACTS if name in manifest}


@functools.cache
def _run_facet() -> Any:
    """The class of anybatch's run facet, made on first use: its base class needs OpenLineage installed."""
    import attrs
    from airflow.providers.common.compat.openlineage.facet import RunFacet

    facts = {_camel(name): attrs.field(default=None, kw_only=True) for name in _FACTS}
    facet: Any = attrs.make_class("AnyBatchRunFacet", facts, bases=(RunFacet,))
    return facet


def _camel(name: str) -> str:
    """A name in camelCase, as OpenLineage's own facets spell theirs."""
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))
