"""Each option is declared once, in `anybatch.jobs.options`; every surface repeats it, or it is said why not.

A surface is a signature that people read, or something made from the table. To add an option: put it into the
table, and go on until this is green. Where a surface is not to have it, say here why.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
from pydantic_core import PydanticUndefined

import anybatch
from anybatch import AsyncClient, Client, ConfigurationError, Job, build_requests, join_results
from anybatch.cli import main
from anybatch.jobs import options as table
from anybatch.jobs.job import fingerprint
from anybatch.jobs.options import DEFAULT_TIMEOUT, OPTIONS, REQUIRED, Option, Part, option, options_of
from anybatch.providers import get_provider
from anybatch.providers.base import DEFAULT_WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("core/anybatch", "anybatch_airflow", "anybatch_dagster")


def _docs_script() -> ModuleType:
    """docs/make_options.py; it also gives Airflow a home, before Airflow is imported."""
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs" / "make_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_options = _docs_script()

from anybatch_airflow import AnyBatchCreateOperator, AnyBatchOperator, AnyBatchResultsOperator  # noqa: E402
from anybatch_airflow.decorators import anybatch_task  # noqa: E402
from anybatch_dagster import (  # noqa: E402
    BatchAssetComponent,
    BatchResource,
    batch_asset,
    build_batch_assets,
)
from anybatch_dagster.component_schema import BatchResourceModel  # noqa: E402

# --- the surfaces ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """How a surface has an option."""

    default: Any
    annotation: Any


def of_function(function: Callable[..., Any]) -> dict[str, Given]:
    parameters = inspect.signature(function).parameters.values()
    return {
        one.name: Given(REQUIRED if one.default is one.empty else one.default, one.annotation)
        for one in parameters
        if one.name not in ("self", "kwargs")
    }


def of_job() -> dict[str, Given]:
    def default(field: dataclasses.Field[Any]) -> Any:
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        return REQUIRED if field.default is dataclasses.MISSING else field.default

    return {field.name: Given(default(field), field.type) for field in dataclasses.fields(Job)}


def of_model(model: Any) -> dict[str, Given]:
    return {
        field.alias or name: Given(
            REQUIRED if field.default is PydanticUndefined else field.default, field.annotation
        )
        for name, field in model.model_fields.items()
    }


SURFACES: dict[str, dict[str, Given]] = {
    "Job": of_job(),
    "Client.run": of_function(Client.run),
    "AsyncClient.run": of_function(AsyncClient.run),
    "run_job": of_function(anybatch.run_job),
    "arun_job": of_function(anybatch.arun_job),
    "AnyBatchOperator": of_function(AnyBatchOperator.__init__),
    "@task.anybatch": of_function(anybatch_task),
    "build_batch_assets": of_function(build_batch_assets),
    "@batch_asset": of_function(batch_asset),
    "BatchAssetComponent": of_model(BatchAssetComponent),
    "BatchResource": of_model(BatchResource),
    "BatchResourceModel": of_model(BatchResourceModel),
    # Of these some options are no concern, so nothing is lacking; what they have is to be right.
    "build_requests": of_function(build_requests),
    "join_results": of_function(join_results),
    "AnyBatchCreateOperator": of_function(AnyBatchCreateOperator.__init__),
    "AnyBatchResultsOperator": of_function(AnyBatchResultsOperator.__init__),
}
AIRFLOW = ("AnyBatchOperator", "@task.anybatch")
DAGSTER = ("build_batch_assets", "@batch_asset", "BatchAssetComponent")
IN_PIPELINES = (*AIRFLOW, *DAGSTER, "AnyBatchCreateOperator", "AnyBatchResultsOperator")

# The parts whose options a surface has to have all of.
HAS_ALL_OF = {
    "Job": (Part.JOB,),
    "Client.run": (Part.RUN,),
    "AsyncClient.run": (Part.RUN,),
    "run_job": (Part.ACCOUNT, Part.JOB, Part.RUN),
    "arun_job": (Part.ACCOUNT, Part.JOB, Part.RUN),
    **dict.fromkeys((*AIRFLOW, *DAGSTER), tuple(Part)),
    "BatchResource": (Part.ACCOUNT,),
    "BatchResourceModel": (Part.ACCOUNT,),
}


# --- what differs, and why -------------------------------------------------------------------------------

_RUN_JOB = {"deadline": "a call that begins now takes `timeout`; the moment is for those who go on"}
_PIPELINE = {
    "id": "the identity is the task instance's, or the asset's and its partitions'",
    "lease": "attempts of a task or a step follow each other; 90 s is for those that do not",
    "deadline": "it would be the same for every run; `timeout` counts from each round's batches",
    "on_progress": "the log and the tags of runs tell the progress",
}
_AIRFLOW = {
    **_PIPELINE,
    "restart": "who clears a task wants its results; a new run is a new job",
    "api_key": "it is in the connection, never in a DAG",
    "client_args": "they are in the connection",
    "settings": "they are in the connection",
}
_DAGSTER = {
    **_PIPELINE,
    "restart": "it is `force` in the run's config (`SubmitConfig`), as it is the run's and not the asset's",
    "input": "a function makes the requests; in the component it is `table`",
    "provider": "it is the resource's",
    "api_key": "it is the resource's",
    "api_base": "it is the resource's",
    "client_args": "they are the resource's",
    "settings": "they are the resource's",
}
LACKING: dict[str, dict[str, str]] = {
    "run_job": _RUN_JOB,
    "arun_job": _RUN_JOB,
    "AnyBatchOperator": _AIRFLOW,
    "@task.anybatch": {**_AIRFLOW, "input": "it is the decorated function"},
    "build_batch_assets": _DAGSTER,
    "@batch_asset": _DAGSTER,
    "BatchAssetComponent": _DAGSTER,
}
NOT_ON_THE_COMMAND_LINE = {
    **_RUN_JOB,
    "api_key": "every process of the machine sees a command line; the environment variable is for it",
    "client_args": "objects of the HTTP client cannot be written there",
    "on_progress": "the command prints the progress itself",
    **dict.fromkeys(
        ("prompt", "id_column", "system", "body"),
        "`run` takes request lines; `build_requests` makes them of a table",
    ),
}
DIFFERENT: dict[tuple[str, str], str] = {  # in default, and so in type
    **{
        (name, "provider"): "the connection may say it"
        for name in (*AIRFLOW, "AnyBatchCreateOperator", "AnyBatchResultsOperator")
    },
    **{(name, "output"): "below the resource's, each job has a folder of its own" for name in DAGSTER},
    ("BatchAssetComponent", "prompt"): "its rows are always made into requests",
    ("BatchAssetComponent", "model"): "its rows are always made into requests, and these need a model",
    ("build_requests", "model"): "a request needs one; a file of requests may name it line by line",
    ("AnyBatchResultsOperator", "endpoint"): "the batch tells it, on all providers but one",
    ("build_requests", "body"): "it is `**body`",
}
_OF_ASSETS = {
    "name", "key_prefix", "resource_key", "value", "partitions_def", "backfill_policy", "deps",
    "automation_condition", "freshness_policy", "retry_policy", "code_version", "description", "group_name",
    "tags", "owners", "kinds", "definition_metadata", "io_manager_key", "op_tags", "pool",
}  # fmt: skip
# What a surface has beside the options of the table. An option added to one surface alone is found here.
OWN: dict[str, set[str]] = {
    "Client.run": {"job"},
    "AsyncClient.run": {"job"},
    "AnyBatchOperator": {"conn_id", "deferrable", "min_defer_seconds"},
    "@task.anybatch": {
        "conn_id", "deferrable", "min_defer_seconds", "python_callable", "multiple_outputs",
    },
    "build_batch_assets": {"requests", "ins", *_OF_ASSETS},
    "@batch_asset": {"ins", *_OF_ASSETS},
    "BatchAssetComponent": {"table", "resource", "polling_sensor", *_OF_ASSETS},
    "BatchResource": {"output", "max_in_flight"},
    "BatchResourceModel": {"output", "max_in_flight"},
}  # fmt: skip

NAMES = {one.name for one in OPTIONS}
# Every option that a surface has, once for each.
HAD = [
    pytest.param(surface, name, id=f"{surface}-{name}")
    for surface, given in SURFACES.items()
    for name in given
    if name in NAMES and name not in OWN.get(surface, ())
]


@pytest.mark.parametrize("surface", HAS_ALL_OF)
def test_no_surface_lacks_an_option_without_a_reason(surface: str) -> None:
    expected = {one.name for one in options_of(*HAS_ALL_OF[surface])}
    lacking = expected - SURFACES[surface].keys()
    assert lacking == LACKING.get(surface, {}).keys()


@pytest.mark.parametrize("surface", HAS_ALL_OF)
def test_no_surface_has_an_option_that_the_table_does_not_have(surface: str) -> None:
    own = {name for name in SURFACES[surface] if name not in NAMES}
    assert own == {name for name in OWN.get(surface, ()) if name not in NAMES}


def test_what_differs_is_there() -> None:
    """A reason that has outlived its cause would hide the next difference."""
    assert [(surface, name) for surface, name in DIFFERENT if name not in SURFACES[surface]] == []
    assert all(reason for reasons in LACKING.values() for reason in reasons.values())


# --- the same name, default, type, choices ---------------------------------------------------------------


def plain(default: Any) -> Any:
    """A default that can be compared: a signature has None where the default is an empty mapping."""
    return None if default == {} else default


@pytest.mark.parametrize(("surface", "name"), HAD)
def test_a_default_is_the_same_everywhere(surface: str, name: str) -> None:
    one, given = option(name), SURFACES[surface][name]
    wanted = one.pipeline_default if surface in IN_PIPELINES else one.default
    assert (plain(given.default) == plain(wanted)) is ((surface, name) not in DIFFERENT)


# The types that all surfaces can write alike, and where one does not.
PLAIN = {
    "str", "int", "float", "str | None", "int | None", "float | None", "tuple[float, float] | None"
}  # fmt: skip
OTHER_TYPE = {("BatchAssetComponent", "system"): "or the file that holds it"}


@pytest.mark.parametrize(("surface", "name"), HAD)
def test_a_type_is_the_same_everywhere(surface: str, name: str) -> None:
    one, annotation = option(name), SURFACES[surface][name].annotation
    if one.choices:
        alias = getattr(table, annotation) if isinstance(annotation, str) else annotation
        assert get_args(alias) == one.choices
    elif one.type in PLAIN and (surface, name) not in DIFFERENT | OTHER_TYPE:
        told = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        may_be_left_out = surface in IN_PIPELINES and one.pipeline_default is None is not one.default
        assert told == (f"{one.type} | None" if may_be_left_out else one.type)


@pytest.mark.parametrize("one", [one for one in OPTIONS if one.choices], ids=lambda one: one.name)
def test_the_choices_are_those_of_the_type(one: Option) -> None:
    assert get_args(getattr(table, one.type)) == one.choices
    assert one.default in one.choices


def test_a_job_and_run_job_have_the_same_types() -> None:
    """But for what cannot be a default, and the folder that only this package makes."""
    job, function = SURFACES["Job"], SURFACES["run_job"]
    differing = {name for name, given in job.items() if function[name].annotation != given.annotation}
    assert differing == {"metadata", "options", "output"}
    assert all(
        function[name].annotation == f"{job[name].annotation} | None" for name in ("metadata", "options")
    )


def test_a_job_refuses_what_is_no_choice() -> None:
    for one in options_of(Part.JOB):
        if one.choices:
            wrong = f"^{one.name}: must be '{one.choices[0]}' or .*, not 'no'"
            with pytest.raises(ConfigurationError, match=wrong):
                Job(input=(), output="out", **{one.name: "no"})


def test_the_operations_window_is_the_job_s() -> None:
    assert option("completion_window").default == DEFAULT_WINDOW


# --- the command line ------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `run_job` was given by the command."""
    given: dict[str, Any] = {}

    def run_job(**options: Any) -> Any:
        given.update(options)
        raise ConfigurationError("it ends here")

    monkeypatch.setattr(anybatch, "run_job", run_job)
    return given


def test_the_command_line_has_the_options_and_their_defaults(ran: dict[str, Any]) -> None:
    assert main(["run", "in", "out", "--provider", "openai"]) == 2
    del ran["on_progress"]  # the command's own
    assert NAMES - ran.keys() == NOT_ON_THE_COMMAND_LINE.keys()
    assert (ran.pop("input"), ran.pop("output"), ran.pop("provider")) == ("in", "out", "openai")
    assert ran == {name: option(name).default for name in ran}


def test_each_flag_reaches_the_job(ran: dict[str, Any]) -> None:
    line = """run in out --provider anthropic --api-base https://x --endpoint /v1/messages --id me --model m
        --completion-window 48h --metadata team=1 --metadata a=b=c --options n=1 --options t=text
        --options d={"a":[true]} --on-orphan resubmit --on-changed fail --on-untranslatable drop
        --on-lost land --keep-requests always --settings region=eu
        --shard-requests 7 --max-rounds 3 --restart again --lease 5 --price 0.5 2 --timeout 1.5
        --on-timeout cancel --on-partial fail --max-failed-ratio 0.25"""
    assert main(line.split()) == 2
    del ran["on_progress"]
    expected = {
        "input": "in", "output": "out", "provider": "anthropic", "api_base": "https://x",
        "endpoint": "/v1/messages", "id": "me", "model": "m", "completion_window": "48h",
        "metadata": {"team": "1", "a": "b=c"}, "options": {"n": 1, "t": "text", "d": {"a": [True]}},
        "on_orphan": "resubmit", "on_changed": "fail", "on_untranslatable": "drop", "on_lost": "land",
        "settings": {"region": "eu"}, "shard_requests": 7, "keep_requests": "always", "max_rounds": 3,
        "restart": "again", "lease": 5.0, "price": (0.5, 2.0),
        "timeout": 1.5, "on_timeout": "cancel", "on_partial": "fail", "max_failed_ratio": 0.25,
    }  # fmt: skip
    assert ran == expected
    assert [name for name, value in expected.items() if value == option(name).default] == []  # all were said


def test_the_help_is_the_table_s(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "10000")  # one line an option
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    told = capsys.readouterr().out
    for one in OPTIONS:
        if one.name not in NOT_ON_THE_COMMAND_LINE:
            assert one.text in told
    assert "Default: 90.0." in told


@pytest.mark.parametrize("flag", ["--metadata", "--options"])
def test_a_pair_without_a_value_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "in", "out", "--provider", "openai", flag, "x"]) == 2
    assert f"{flag} x: expected KEY=VALUE" in capsys.readouterr().err


# --- texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", OPTIONS, ids=lambda one: one.name)
def test_a_text_is_one_plain_sentence(one: Option) -> None:
    assert re.fullmatch(r"[A-Z][^.]*(\.[^. ][^.]*)*\.", one.text)


@cache
def component_schema() -> dict[str, Any]:
    properties: dict[str, Any] = BatchAssetComponent.model().model_json_schema()["properties"]
    return properties


@pytest.mark.parametrize("name", sorted(NAMES & SURFACES["BatchAssetComponent"].keys() - {"output"}))
def test_the_component_says_what_the_table_says(name: str) -> None:
    """`output` is another thing there: below it, each job has a folder of its own. See `DIFFERENT`."""
    assert component_schema()[name]["description"].startswith(option(name).text)


@pytest.mark.parametrize(
    ("documented", "pattern"),
    [(AnyBatchOperator, r"^    {}: "), (build_batch_assets, r"^    {}: "), (Job, r"\b{}\b")],
)
def test_the_docstring_speaks_of_each_option(documented: Any, pattern: str) -> None:
    surface = SURFACES[documented.__name__].keys()
    text = inspect.getdoc(documented) or ""
    named = [name for name in surface & NAMES if re.search(pattern.format(name), text, re.MULTILINE)]
    # The fields that say it themselves: name and type.
    plain_fields = {"endpoint", "model", "completion_window", "metadata", "options"}
    assert surface & NAMES - set(named) <= (plain_fields if documented is Job else set())


def test_the_page_of_options_is_up_to_date() -> None:
    assert make_options.PAGE.read_text(encoding="utf-8") == make_options.page(), "run: make options"


@pytest.mark.parametrize("page", ["airflow.md", "dagster.md"])
def test_the_pages_tables_have_the_defaults(page: str) -> None:
    """Rows like "| `max_rounds` | 1 | …": these say more of an option than its sentence, by hand."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M)
    told = {name: shown.strip('` "') for name, shown in rows if name in NAMES}
    assert {"max_rounds", "timeout", "on_timeout", "on_partial", "on_lost"} <= told.keys()
    wanted = {name: option(name).pipeline_default for name in told}
    assert told == {
        name: "26 h" if default == DEFAULT_TIMEOUT else told[name] if default is None else str(default)
        for name, default in wanted.items()
    }
    assert all(told[name] in ("", "none") for name, default in wanted.items() if default is None)


# --- the fingerprint -------------------------------------------------------------------------------------


def test_the_fingerprint_holds_what_the_table_says() -> None:
    """Of the account and the job; what makes requests of a table makes another input."""
    job = Job(input=(), output="out")
    other: dict[str, Any] = {
        "endpoint": "/v1/embeddings", "id": "me", "model": "m", "completion_window": "48h",
        "metadata": {"a": "b"}, "options": {"a": 1}, "on_orphan": "resubmit", "on_changed": "fail",
        "on_untranslatable": "drop", "on_lost": "land", "shard_requests": 3,
        "keep_requests": "always", "max_rounds": 2, "lease": 1.0,
        "price": (1.0, 2.0), "output": "other",
    }  # fmt: skip
    openai = get_provider("openai", api_key="k")
    before = fingerprint(job, openai, "digest")
    counts = {
        name
        for name, value in other.items()
        if fingerprint(replace(job, **{name: value}), openai, "digest") != before
    }
    changed = {
        "input": fingerprint(job, openai, "another digest"),
        "restart": fingerprint(job, openai, "digest", ["again"]),
        "provider": fingerprint(job, get_provider("groq", api_key="k"), "digest"),
        "api_key": fingerprint(job, get_provider("openai", api_key="other"), "digest"),
        "api_base": fingerprint(job, get_provider("openai", api_key="k", api_base="https://x/v1"), "digest"),
    }
    there = get_provider("openai", api_key="k")
    there.account = replace(there.account, settings={"region": "eu"})
    changed["settings"] = fingerprint(job, there, "digest")
    counts |= {name for name, value in changed.items() if value != before}
    assert counts == {one.name for one in options_of(Part.ACCOUNT, Part.JOB) if one.in_fingerprint}
    tried = other.keys() | changed.keys()
    assert {one.name for one in options_of(Part.ACCOUNT, Part.JOB)} - tried == {
        "client_args"
    }  # no part of a job
    assert all(one.in_fingerprint for one in options_of(Part.TABLE))
    assert not any(one.in_fingerprint for one in options_of(Part.RUN))


# --- no second definition --------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def test_choices_are_listed_nowhere_else() -> None:
    lists = {re.escape(", ".join(f'"{choice}"' for choice in one.choices)) for one in OPTIONS if one.choices}
    found = {
        path for path, text in sources().items() for one in lists if re.search(rf"[\[(]{one},?[\])]", text)
    }
    assert found == {"core/anybatch/jobs/options.py"}


def test_the_timeout_is_said_nowhere_else() -> None:
    written = re.compile(r"hours=26\b|\b26 \* 3600|\b93[_,]?600\b")
    assert {path for path, text in sources().items() if written.search(text)} == {
        "core/anybatch/jobs/options.py"
    }


def test_no_constant_is_a_second_default() -> None:
    """Of the two that there are the second is the operations', and equal: see above."""
    constants = {
        name for text in sources().values() for name in re.findall(r"^_?DEFAULT_\w+", text, re.MULTILINE)
    }
    assert constants == {
        "DEFAULT_TIMEOUT",
        "DEFAULT_WINDOW",
        "DEFAULT_DIMENSIONS",
    }  # the last is a stand-in's
