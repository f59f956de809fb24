"""What Airflow is told of the package, and what its commands show of it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import Connection

import anybatch_airflow
from anybatch_airflow.hooks import read_connection
from anybatch_airflow.provider_info import get_provider_info

from .versions import Providers, needs

FORM = needs(2, "commands that show the form without wtforms")


def test_the_info_is_what_airflow_accepts() -> None:
    import airflow
    import jsonschema

    schema = json.loads((Path(airflow.__file__).parent / "provider_info.schema.json").read_text())
    jsonschema.validate(get_provider_info(), schema)
    # A provider whose package-name is not its distribution's is refused.
    assert get_provider_info()["package-name"] == importlib.metadata.metadata("anybatch")["Name"]


def test_the_info_names_what_exists() -> None:
    info = get_provider_info()
    modules = [name for kind in ("hooks", "operators", "sensors", "triggers") for entry in info[kind]
               for name in entry["python-modules"]]  # fmt: skip
    assert modules == [
        f"anybatch_airflow.{name}" for name in ("hooks", "operators", "sensors", "triggers", "events")
    ]
    for name in modules:
        importlib.import_module(name)
    [kind] = info["connection-types"]
    assert load(kind["hook-class-name"]).conn_type == kind["connection-type"]
    [decorator] = info["task-decorators"]
    assert decorator["name"] == "anybatch"
    assert callable(load(decorator["class-name"]))
    assert [load(path).__name__ for path in info["extra-links"]] == ["BatchLink", "ResultsLink"]


def load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_option_that_is_read_is_declared() -> None:
    """An option that is not declared has no default and shows in no listing."""
    package = Path(str(anybatch_airflow.__file__)).parent
    text = "\n".join(path.read_text() for path in package.rglob("*.py"))
    read = set(re.findall(r"""conf\.get\w*\(\s*"anybatch",\s*"(\w+)\"""", text))
    assert read == set(get_provider_info()["config"]["anybatch"]["options"])


def test_the_form_shows_the_fields_that_are_read() -> None:
    """A field that the hook does not know would be filled in and forgotten."""
    [kind] = get_provider_info()["connection-types"]
    assert set(kind["conn-fields"]) == {"provider", "client_args", "settings", "console_url"}
    extra = {
        "provider": "openai",
        "client_args": {"timeout": 9},
        "settings": {"region": "eu"},
        "console_url": "https://gw/{batch_id}",
    }
    settings = read_connection(Connection(conn_id="c", conn_type="anybatch"), extra)
    assert (settings.provider, settings.client_args, settings.settings, settings.console_url) == (
        "openai", {"timeout": 9}, {"region": "eu"}, "https://gw/{batch_id}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """What `airflow providers …` prints, by its words, and the API server's form; all in one process."""
    commands = {words: ["providers", *words.split(), "--output", "json"] for words in _COMMANDS}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN, json.dumps(commands)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


_COMMANDS = ("list", "hooks", "widgets", "behaviours", "links", "triggers", "get anybatch --full")
_RUN = """
import contextlib, io, json, sys
from airflow.api_fastapi.core_api.services.ui.connections import HookMetaService
from airflow.cli import cli_parser
forms = {form.connection_type: form.model_dump_json() for form in HookMetaService.hook_meta_data()}
shown = {"form": forms["anybatch"]}
for words, arguments in json.loads(sys.argv[1]).items():
    parsed = cli_parser.get_parser().parse_args(arguments)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        parsed.func(parsed)
    shown[words] = out.getvalue()
print(json.dumps(shown))
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("list", ["anybatch"]),
        ("hooks", ["anybatch_airflow.hooks.AnyBatchHook", "anybatch (LLM batches)"]),
        pytest.param("widgets", ["extra__anybatch__provider", "extra__anybatch__console_url"], marks=FORM),
        pytest.param("behaviours", ["anybatch"], marks=FORM),
        ("links", ["anybatch_airflow.links.BatchLink", "anybatch_airflow.links.ResultsLink"]),
        ("triggers", ["anybatch_airflow.triggers", "anybatch_airflow.events"]),
        ("get anybatch --full", ["anybatch_airflow.decorators.anybatch_task", "min_defer_seconds"]),
    ],
)
def test_the_commands_of_airflow_show_it(shown: dict[str, str], words: str, expected: list[str]) -> None:
    assert not [text for text in expected if text not in shown[words]]


def test_a_worker_knows_the_decorator_and_the_hook() -> None:
    providers = Providers()
    assert "anybatch" in providers.taskflow_decorators
    hook = providers.hooks["anybatch"]
    assert hook is not None
    assert hook.hook_class_name == "anybatch_airflow.hooks.AnyBatchHook"


def test_the_api_server_knows_the_form(shown: dict[str, str]) -> None:
    form = json.loads(shown["form"])
    assert form["hook_name"] == "anybatch (LLM batches)"
    assert form["standard_fields"]["password"]["title"] == "API key"
    assert form["standard_fields"]["login"]["hidden"] is True
    assert set(form["extra_fields"]) == {"provider", "client_args", "settings", "console_url"}
    assert "openai-compatible" in json.dumps(form["extra_fields"]["provider"])


def test_public_names_are_pinned() -> None:
    assert anybatch_airflow.__all__ == [
        "AnyBatchCancelOperator",
        "AnyBatchCreateOperator",
        "AnyBatchHook",
        "AnyBatchOperator",
        "AnyBatchResultsOperator",
        "AnyBatchSensor",
        "AnyBatchTrigger",
        "BatchCompletedTrigger",
        "__version__",
    ]
    assert anybatch_airflow.__all__ == sorted(anybatch_airflow.__all__)
    for name in anybatch_airflow.__all__:
        assert getattr(anybatch_airflow, name)
    assert anybatch_airflow.__version__ == importlib.metadata.version("anybatch")
    with pytest.raises(AttributeError, match="AnyBatchOperater"):
        _ = anybatch_airflow.AnyBatchOperater
