"""Where a job's rows came from and went, for Airflow's hook lineage and for OpenLineage.

An operator calls `report_lineage` once its results have landed, and has

    def get_openlineage_facets_on_complete(self, task_instance):
        return openlineage_facets(self._source, self._manifest)

`source` is what was given as input: a path or URL is a dataset, requests in memory are none. Where nothing in
the deployment reads lineage, neither costs more than a call.
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

# The members of a manifest that a lineage system is told: figures and names, no content.
_FACTS = (
    "job", "provider", "endpoint", "models", "rows", "rounds", "counts", "input_tokens", "output_tokens",
    "cost", "batch_ids", "duration_s",
)  # fmt: skip


def report_lineage(hook: BaseHook, source: object, manifest: Mapping[str, Any]) -> None:
    """Tell Airflow's lineage collector what was read and what was written."""
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
    """What OpenLineage's listener asks an operator for; None where its provider is not installed."""
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
    told = _facts(manifest)
    found.run_facets["anybatch"] = _run_facet()(**{_camel(name): value for name, value in told.items()})
    return found


def asset_uri(location: object) -> str | None:
    """A path or URL as the URI of an asset, without the Airflow connection it may name."""
    # Asked of the class: an instance would open its file system to answer.
    if not isinstance(location, (str, os.PathLike)) and not hasattr(type(location), "fs"):
        return None
    text = str(location)
    if "://" not in text:
        return "file://" + quote(os.path.abspath(text))
    parts = urlsplit(text)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def dataset_name(location: object) -> tuple[str, str] | None:
    """Namespace and name of a path or URL by OpenLineage's naming of datasets."""
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
    """The class of our run facet; its base is OpenLineage's, which may not be there."""
    import attrs
    from airflow.providers.common.compat.openlineage.facet import RunFacet

    facts = {_camel(name): attrs.field(default=None, kw_only=True) for name in _FACTS}
    facet: Any = attrs.make_class("AnyBatchRunFacet", facts, bases=(RunFacet,))
    return facet


def _camel(name: str) -> str:
    """A name as OpenLineage's own facets spell theirs."""
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))
