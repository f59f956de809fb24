"""Options and facts of a provider that reach it in its own way; what is not its own stays out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from anybatch import BadRequestError, Job, UnknownOptionError
from tests.fakes.forms import parse_form

from .world import REMOTE, Driver, RemoteWorld, landed, row_ids

if TYPE_CHECKING:
    from pathlib import Path

UPLOAD = ("POST", ".*/files")
CREATE = ("POST", ".*/(batches|batch/jobs)")
MONTH = {"anchor": "created_at", "seconds": 1209600}


def provider_is(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shared_world", names, indirect=True, scope="module")


def created(world: RemoteWorld, driver: Driver, path: Path, **more: Any) -> dict[str, Any]:
    """The body of the create that these options make."""
    source = world.write(path / "in.jsonl", row_ids(2))
    driver.create(source, world.endpoint, **{"completion_window": world.window, **more})
    (call,) = world.server.find(*CREATE)
    body = call.json()
    assert isinstance(body, dict)
    return body


def form(world: RemoteWorld) -> dict[str, str]:
    (call,) = world.server.find(*UPLOAD)
    parts = parse_form(call.headers["content-type"], call.body)
    return {name: part.text for name, part in parts.items() if name != "file"}


@provider_is("openai", "azure", "litellm", "openai-compatible")
def test_lifetimes_of_files(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """The upload's in a form, with brackets or dots, the results' in the create."""
    body = created(world, driver, tmp_path, input_expires_after=MONTH, output_expires_after=MONTH)
    assert body["output_expires_after"] == MONTH
    assert "input_expires_after" not in body
    names = ("expires_after.anchor", "expires_after.seconds") if world.name == "azure" else (
        "expires_after[anchor]", "expires_after[seconds]")  # fmt: skip
    assert form(world) == {"purpose": "batch", names[0]: "created_at", names[1]: "1209600"}
    assert world.fake.files[body["input_file_id"]].expires_at is not None


@provider_is("openai", "azure", "litellm", "openai-compatible")
def test_lifetimes_of_files_in_a_job(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    world.let_batches_end()
    options = {"input_expires_after": MONTH, "output_expires_after": MONTH}
    job = world.job(tmp_path, options=options)
    landed(job, driver.run(job, timeout=10), row_ids(8))
    assert len(form(world)) == 3
    assert world.server.find(*CREATE)[0].json()["output_expires_after"] == MONTH


@provider_is(*REMOTE)
def test_nothing_is_sent_that_was_not_asked_for(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    body = created(world, driver, tmp_path)
    expected = {
        "mistral": {"input_files", "endpoint", "model", "timeout_hours"},
        "anthropic": {"requests"},
    }.get(world.name, {"input_file_id", "endpoint", "completion_window"})
    assert set(body) == expected
    if world.name != "anthropic":
        assert form(world) == {"purpose": "batch"}
        (call,) = world.server.find(*UPLOAD)
        part = parse_form(call.headers["content-type"], call.body)["file"]
        assert (part.filename or "").endswith(".jsonl")
        members = (
            {"custom_id", "body"}
            if world.name in ("mistral", "novita")
            else {"custom_id", "method", "url", "body"}
        )
        assert all(set(json.loads(line)) == members for line in part.data.splitlines())
    assert all(call.headers["user-agent"].startswith("anybatch/") for call in world.calls)


@provider_is("mistral")
@pytest.mark.parametrize(
    ("given", "hours"),
    [
        ({}, 24),
        ({"completion_window": "7d"}, 168),
        ({"completion_window": "2h"}, 2),
        ({"timeout_hours": 48}, 48),
    ],
)
def test_mistral_hours(
    world: RemoteWorld, driver: Driver, tmp_path: Path, given: dict[str, Any], hours: int
) -> None:
    body = created(world, driver, tmp_path, **given)
    assert body["timeout_hours"] == hours
    assert body["model"] == "m-1", "the model is a member of the job"
    assert len(body["input_files"]) == 1


@provider_is("siliconflow")
def test_siliconflow_replaces_the_model(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    assert created(world, driver, tmp_path, replace={"model": "m-2"})["replace"] == {"model": "m-2"}


@provider_is("zhipu")
def test_zhipu_deletes_the_input(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    assert created(world, driver, tmp_path, auto_delete_input_file=True)["auto_delete_input_file"] is True


@provider_is("perplexity")
def test_perplexity_gets_an_idempotency_key(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """Every create of a client's is one of its own; a job's is always the same."""
    source = world.write(tmp_path / "in.jsonl", row_ids(2))
    for _ in range(2):
        driver.create(source, world.endpoint)
    assert len(world.fake.batches) == 2
    keys = [call.headers["idempotency-key"] for call in world.server.find(*CREATE)]
    assert len(set(keys)) == 2
    assert all(0 < len(key) <= 255 for key in keys)


@provider_is("openai", "mistral", "groq")
def test_no_other_provider_gets_one(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    created(world, driver, tmp_path)
    assert not any("idempotency-key" in call.headers for call in world.calls)


@provider_is("azure")
def test_azure_files_are_waited_for(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """A create before its file is `processed` would be refused."""
    created(world, driver, tmp_path)
    methods = [f"{call.method} {call.path.rsplit('/', 1)[-1][:5]}" for call in world.calls]
    assert methods == ["POST files", "GET file-", "POST batch"]


LISTS = {
    "dashscope": ({"ds_name": "x", "status": "completed,expired"}, "ds_name=x"),
    "doubleword": ({"search": "x", "active_first": True}, "active_first=true"),
    "azure": ({"$filter": "created_at gt 1", "$orderby": "created_at asc"}, None),
    "groq": ({"id": ["batch_1", "batch_2"]}, "id="),
    "litellm": ({"target_model_names": "a,b"}, None),
    "mistral": ({"status": ["QUEUED", "RUNNING"], "metadata": {"team": "a"}}, None),
}


@provider_is(*LISTS)
def test_list_options_become_the_query(world: RemoteWorld, driver: Driver) -> None:
    options, _ = LISTS[world.name]
    driver.list(**options)
    (call,) = world.calls
    query = {name: values if len(values) > 1 else values[0] for name, values in call.query.items()}
    expected = {
        name: {True: "true"}.get(value, value) if isinstance(value, bool) else value
        for name, value in options.items()
    }
    if world.name == "mistral":
        expected = {
            "status": ["QUEUED", "RUNNING"],
            "team": "a",
            "page": "0",
            "page_size": "100",
            "order_by": "-created",
        }
    assert query == expected


@provider_is("litellm")
def test_litellm_s_route_is_part_of_the_address(world: RemoteWorld, driver: Driver, tmp_path: Path) -> None:
    """An option of the create would be missing from every later call about the batch."""
    with pytest.raises(UnknownOptionError, match="put it into api_base, http://localhost:4000/azure/v1"):
        created(world, driver, tmp_path, custom_llm_provider="azure")
    assert world.calls == []


@provider_is("openai")
def test_organisation_and_project_are_sent_along(
    world: RemoteWorld, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    with world.open(mode) as driver:
        driver.check()
    (call,) = world.calls
    assert (call.headers["openai-organization"], call.headers["openai-project"]) == ("org-1", "proj-1")


@provider_is("openai", "anthropic")
def test_client_args_reach_httpx(world: RemoteWorld, mode: str) -> None:
    with world.open(
        mode, client_args={"headers": {"x-team": "a", "user-agent": "mine"}, "timeout": 3}
    ) as driver:
        driver.check()
    (call,) = world.calls
    assert (call.headers["x-team"], call.headers["user-agent"]) == ("a", "mine")


@provider_is("dashscope", "doubleword", "openai")
def test_what_only_the_provider_can_judge_is_left_to_it(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    """Windows differ and change: its own words are passed on, with what it asked and answered."""
    source = world.write(tmp_path / "in.jsonl", row_ids(2))
    with pytest.raises(BadRequestError, match="Invalid value: '9w'") as caught:
        driver.create(source, world.endpoint, completion_window="9w")
    assert "completion_window" in str(caught.value)
    assert caught.value.request_id
    assert caught.value.status_code == 400


@provider_is("openai")
def test_the_same_job_with_other_options_is_another(
    world: RemoteWorld, driver: Driver, tmp_path: Path
) -> None:
    job = world.job(tmp_path)
    (first,) = driver.submit(job)
    (again,) = driver.submit(job)
    assert first.id == again.id
    other = Job(input=job.input, output=job.output, options={"output_expires_after": MONTH})
    (second,) = driver.submit(other)
    assert second.id != first.id
    assert [batch.id for batch in world.fake.live_batches()] == [second.id]
