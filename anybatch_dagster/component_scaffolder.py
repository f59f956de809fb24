"""What `dg scaffold defs anybatch_dagster.BatchAssetComponent` writes: a component that runs as it is."""

from typing import Any

import dagster as dg
from pydantic import Field

_FILE = "texts.csv"
_ROWS = """id,text
1,"The delivery came two days late, but the support was friendly."
2,"It does what it should."
3,"The battery is empty after an hour. I want my money back."
"""
_PYTHON = """from pathlib import Path

import dagster as dg
from anybatch_dagster import BatchResource
from anybatch_dagster.component import File
from {module} import {cls}


@dg.component_instance
def load(context: dg.ComponentLoadContext) -> {cls}:
    return {cls}(
        name={name!r},
        table={table},
        prompt={prompt!r},
{id_column}        model={model!r},
        resource_key={provider!r},
        resource=BatchResource(provider={provider!r}),
    )
"""


class BatchScaffoldParams(dg.Model):
    """The options of `dg scaffold defs`; without any it writes three rows for the embedded provider."""

    name: str | None = Field(default=None, description="Name of the result asset; the folder's if left out.")
    table: str | None = Field(default=None, description="Asset key of the upstream table.")
    prompt: str = Field(default="Sum up in a few words: {text}", description="Prompt template.")
    provider: str = Field(default="local", description="Name of the provider.")
    model: str = Field(default="local:echo?delay=20", description="Name of the model.")


class BatchScaffolder(dg.Scaffolder[BatchScaffoldParams]):
    """Writes the component, and a table if none is named."""

    @classmethod
    def get_scaffold_params(cls) -> type[BatchScaffoldParams]:
        return BatchScaffoldParams

    def scaffold(self, request: dg.ScaffoldRequest[BatchScaffoldParams]) -> None:
        folder = request.target_path.parent if request.append else request.target_path
        given = request.params.model_dump()
        given["name"] = given["name"] or folder.name.replace("-", "_")
        if given["table"] is None and not (folder / _FILE).exists():
            (folder / _FILE).write_text(_ROWS, encoding="utf-8")
        if request.scaffold_format == "python":
            text = _python(request.type_name, given)
            (folder / "component.py").write_text(text, encoding="utf-8")
        else:
            dg.scaffold_component(request, _attributes(given))


def _attributes(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": given["name"],
        "table": given["table"] or {"file": _FILE},
        "prompt": given["prompt"],
        **({} if given["table"] else {"id_column": "id"}),
        "model": given["model"],
        "resource_key": given["provider"],  # components with the same one share it
        "resource": {"provider": given["provider"]},
    }


def _python(type_name: str, given: dict[str, Any]) -> str:
    module, _, cls = type_name.rpartition(".")
    table = repr(given["table"]) if given["table"] else f"File(file=str(Path(__file__).with_name({_FILE!r})))"
    facts = {**given, "table": table, "id_column": "" if given["table"] else '        id_column="id",\n'}
    return _PYTHON.format(module=module, cls=cls, **facts)
