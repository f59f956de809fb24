"""What becomes of a batch as time passes, and every fault that a model's name can ask for."""

import json
from collections import Counter
from typing import Any

import httpx
import pytest


def test_an_undisturbed_batch_passes_through_every_status(desk, requests):
    batch = desk.create(requests(10), metadata={"job": "j1"})
    start = int(desk.clock.time)
    assert (batch["status"], batch["metadata"]) == ("validating", {"job": "j1"})
    assert batch["expires_at"] == start + 24 * 3600
    seen = [
        (desk.look(batch["id"], 0.5)["status"], desk.look(batch["id"])["request_counts"]) for _ in range(21)
    ]
    assert list(dict.fromkeys(status for status, _ in seen)) == [
        "validating",
        "in_progress",
        "finalizing",
        "completed",
    ]
    counts = [count["completed"] for _, count in seen]
    assert counts == sorted(counts)
    assert len(set(counts)) == 11  # every row is seen to finish
    done = desk.look(batch["id"])
    times = [done[f"{status}_at"] - start for status in ("created", "in_progress", "finalizing", "completed")]
    assert times == [0, 1, 9, 10]
    assert done["request_counts"] == {"total": 10, "completed": 10, "failed": 0}
    assert done["error_file_id"] is None
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"] > 0
    assert set(desk.lines(done["output_file_id"])) == {f"row-{number}" for number in range(10)}


def test_nobody_looking_changes_nothing(desk, requests):
    batch = desk.create(requests(10))
    done = desk.look(batch["id"], 30 * 3600)  # first seen after the window: it was completed long before
    assert (done["status"], done["completed_at"] - done["created_at"]) == ("completed", 10)


def test_the_same_question_has_the_same_answer(desk, requests):
    first, second = (desk.create(requests(50, "local:echo?fail=0.3&seed=7")) for _ in range(2))
    done = [desk.look(batch["id"], 100) for batch in (first, second)]
    failed = [
        {name: line["response"]["status_code"] for name, line in desk.lines(one["error_file_id"]).items()}
        for one in done
    ]
    said = [{name: text(line) for name, line in desk.lines(one["output_file_id"]).items()} for one in done]
    assert failed[0] == failed[1]
    assert said[0] == said[1]
    assert set(failed[0].values()) == {400, 429, 500}
    other = desk.look(desk.create(requests(50, "local:echo?fail=0.3&seed=8"))["id"], 100)
    assert set(desk.lines(other["error_file_id"])) != set(failed[0])


def text(line: dict[str, Any]) -> str:
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


def test_a_failed_row_is_a_response_in_the_error_file(desk, requests):
    done = desk.look(desk.create(requests(3, "local:echo?fail=1"))["id"], 100)
    assert (done["status"], done["output_file_id"]) == ("completed", None)
    assert done["request_counts"] == {"total": 3, "completed": 0, "failed": 3}
    for line in desk.lines(done["error_file_id"]).values():
        assert line["error"] is None
        assert line["response"]["status_code"] >= 400
        assert set(line["response"]["body"]["error"]) == {"message", "type", "param", "code"}


def test_expire_ends_the_batch_as_expired_and_keeps_the_rest(desk, requests):
    done = desk.look(desk.create(requests(40, "local:echo?expire=0.5"))["id"], 100)
    output, errors = desk.lines(done["output_file_id"]), desk.lines(done["error_file_id"])
    assert done["status"] == "expired"
    assert done["completed_at"] is None
    assert done["expired_at"] == done["created_at"] + 2
    assert 5 < len(errors) < 35
    assert len(output) + len(errors) == 40
    assert done["request_counts"] == {"total": 40, "completed": len(output), "failed": 0}
    assert {(line["response"], line["error"]["code"]) for line in errors.values()} == {
        (None, "batch_expired")
    }


def test_a_window_shorter_than_the_delay_expires(desk, requests):
    batch = desk.create(requests(100, "local:echo?delay=100"), completion_window="50s")
    done = desk.look(batch["id"], 500)
    assert (done["status"], done["expires_at"] - done["created_at"]) == ("expired", 50)
    assert len(desk.lines(done["output_file_id"])) == 50
    assert len(desk.lines(done["error_file_id"])) == 50


def test_missing_rows_are_in_no_count_and_in_neither_file(desk, requests):
    done = desk.look(desk.create(requests(40, "local:echo?missing=0.5"))["id"], 100)
    there = len(desk.lines(done["output_file_id"]))
    assert 5 < there < 35
    assert done["request_counts"] == {"total": 40, "completed": there, "failed": 0}
    assert done["error_file_id"] is None


def test_shares_exclude_each_other(desk, requests):
    done = desk.look(desk.create(requests(300, "local:echo?fail=0.3&expire=0.3&missing=0.4"))["id"], 100)
    errors = desk.lines(done["error_file_id"])
    kinds = Counter("failed" if line["response"] else "expired" for line in errors.values())
    assert done["output_file_id"] is None
    assert all(60 < kinds[kind] < 120 for kind in ("failed", "expired"))


def test_invalid_fails_validation_with_the_code(desk, requests):
    batch = desk.create(requests(3, "local:echo?delay=10&invalid=token_limit_exceeded"))
    assert desk.look(batch["id"])["status"] == "validating"
    done = desk.look(batch["id"], 5)
    assert (done["status"], done["errors"]["data"][0]["code"]) == ("failed", "token_limit_exceeded")
    assert done["failed_at"] == done["created_at"] + 1
    assert done["output_file_id"] is done["error_file_id"] is None


def test_the_provider_cancels(desk, requests):
    batch = desk.create(requests(100, "local:echo?delay=100&cancel=50"))
    assert desk.look(batch["id"], 49)["status"] == "in_progress"
    assert desk.look(batch["id"], 2)["status"] == "cancelling"
    done = desk.look(batch["id"], 10)
    assert (done["status"], done["cancelling_at"] - done["created_at"]) == ("cancelled", 50)
    assert done["request_counts"] == {"total": 100, "completed": 50, "failed": 0}
    assert len(desk.lines(done["output_file_id"])) == 50
    assert {line["error"]["code"] for line in desk.lines(done["error_file_id"]).values()} == {
        "batch_cancelled"
    }


@pytest.mark.parametrize(("name", "status"), [("outage", 503), ("throttle", 429)])
def test_a_disturbance_hits_every_request_in_its_window(desk, requests, name, status):
    batch = desk.create(requests(3, f"local:echo?delay=1&{name}=5..15"))
    assert desk.look(batch["id"], 4)["status"] == "completed"
    desk.clock.time += 1
    for path in (f"/batches/{batch['id']}", "/batches", "/files", "/models"):
        response = desk.client.get(path)
        assert response.status_code == status
        assert response.json()["error"]["message"]
        assert response.headers.get("retry-after") == ("10" if name == "throttle" else None)
    assert desk.upload(b"{}\n").status_code == status
    desk.clock.time += 9
    assert desk.client.get("/batches").status_code == status
    desk.clock.time += 1
    assert desk.look(batch["id"])["status"] == "completed"


def test_an_outage_from_the_start_hides_the_answer_to_the_create(desk, requests):
    file_id = desk.upload(requests(3, "local:echo?outage=0..5")).json()["id"]
    asked = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert desk.client.post("/batches", json=asked).status_code == 503
    desk.clock.time += 5
    assert [one["input_file_id"] for one in desk.client.get("/batches").json()["data"]] == [file_id]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            "local:echo?dealy=3",
            "Unknown parameter 'dealy' of 'local:echo'; known are delay, seed, fail, expire",
        ),
        ("local:parrot", "Unknown stand-in model 'local:parrot'; known are local:echo and local:embed."),
        ("local:embed", "'local:embed' does not answer /v1/chat/completions"),
        ("local:echo?fail=2", "'fail=2' of 'local:echo' is wrong: must be a share"),
        ("local:echo?delay=-1", "must be a number of seconds"),
        ("local:echo?delay=nan", "must be a number of seconds"),
        ("local:echo?outage=9..3", "must be start..end"),
        ("local:echo?outage=9", "must be start..end"),
        ("local:echo?seed=1&seed=2", "appears twice"),
        ("local:echo?fail=0.6&expire=0.6", "more than 1"),
        ("local:echo?invalid=No Way", "must be an error code"),
    ],
)
def test_a_wrong_parameter_fails_the_batch_and_is_named(desk, requests, model, expected):
    done = desk.look(desk.create(requests(2, model))["id"], 100)
    assert done["status"] == "failed"
    assert expected in done["errors"]["data"][0]["message"]
    assert done["errors"]["data"][0]["param"] == "body.model"


def test_a_paid_models_name_rehearses_unchanged(desk, requests):
    done = desk.look(desk.create(requests(2, "gpt-5"))["id"], 2)
    assert done["status"] == "completed"
    line = desk.lines(done["output_file_id"])["row-1"]
    assert line["response"]["body"]["model"] == "gpt-5 (stand-in)"
    assert text(line).startswith("please judge number 1")


@pytest.mark.parametrize(
    ("edit", "code", "line"),
    [
        (lambda lines: [*lines[:1], b"{broken\n", *lines[2:]], "invalid_json_line", 2),
        (lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]], "invalid_json_line", 1),
        (lambda lines: [*lines, b'{"custom_id": "\xff"}\n'], "invalid_json_line", 4),
        (lambda lines: [*lines, b"[]\n"], "invalid_json_line", 4),
        (lambda lines: [*lines, b"\n", lines[1]], "duplicate_custom_id", 5),
        (lambda lines: [*lines[:2], lines[2].replace(b"/v1/chat", b"/v2/chat")], "url_mismatch", 3),
        (lambda lines: [*lines[:2], lines[2].replace(b"local:echo", b"gpt-5")], "model_mismatch", 3),
        (lambda lines: [*lines[:2], lines[2].replace(b'"POST"', b'"GET"')], "invalid_method", 3),
        (lambda lines: [*lines[:2], lines[2].replace(b"custom_id", b"id")], "missing_required_parameter", 3),
        (lambda lines: [], "empty_file", None),
        (lambda lines: [b"\n", b"  \n"], "empty_file", None),
    ],
)
def test_validation_fails_later_with_code_and_line(desk, requests, edit, code, line):
    batch = desk.create(b"".join(edit(requests(3).splitlines(keepends=True))))
    assert batch["status"] == "validating"
    done = desk.look(batch["id"], 10)
    assert done["status"] == "failed"
    assert done["errors"]["object"] == "list"
    assert [(one["code"], one["line"]) for one in done["errors"]["data"]] == [(code, line)]
    assert done["request_counts"] == {"total": 0, "completed": 0, "failed": 0}


def test_a_body_the_stand_in_cannot_answer_costs_its_row(desk):
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "fine"}]},
        {},
        {"messages": "hello"},
        {"messages": [{"role": "user", "content": "x"}], "stream": True},
        {"messages": [{"role": "user", "content": 5}], "tools": [3], "tool_choice": "required"},
    ]
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": body | {"model": "gpt-5"},
        }
        for number, body in enumerate(bodies)
    ]
    done = desk.look(desk.create("\n".join(map(json.dumps, lines)).encode())["id"], 10)
    assert done["status"] == "completed"
    assert set(desk.lines(done["output_file_id"])) == {"0"}
    errors = desk.lines(done["error_file_id"])
    assert [errors[str(number)]["response"]["status_code"] for number in range(1, 5)] == [400] * 4


def test_cancel_keeps_the_finished_rows(desk, requests):
    batch = desk.create(requests(100, "local:echo?delay=100"))
    desk.look(batch["id"], 50)
    answer = desk.client.post(f"/batches/{batch['id']}/cancel").json()
    assert (answer["status"], answer["cancelling_at"]) == ("cancelling", int(desk.clock.time))
    again = desk.client.post(f"/batches/{batch['id']}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "cancelling")
    done = desk.look(batch["id"], 6)
    assert done["status"] == "cancelled"
    assert done["request_counts"] == {"total": 100, "completed": 50, "failed": 0}
    assert len(desk.lines(done["output_file_id"])) == 50
    assert desk.client.post(f"/batches/{batch['id']}/cancel").json()["status"] == "cancelled"


def test_cancel_while_validating_leaves_nothing_done(desk, requests):
    batch = desk.create(requests(4, "local:echo?delay=100"))
    assert desk.client.post(f"/batches/{batch['id']}/cancel").json()["status"] == "cancelling"
    done = desk.look(batch["id"], 50)
    assert (done["status"], done["in_progress_at"], done["output_file_id"]) == ("cancelled", None, None)
    assert len(desk.lines(done["error_file_id"])) == 4


@pytest.mark.parametrize("model", ["local:echo?delay=1", "local:echo?expire=1", "local:echo?invalid=x"])
def test_what_has_ended_cannot_be_cancelled(desk, requests, model):
    batch = desk.create(requests(3, model))
    ended = desk.look(batch["id"], 10)
    response: httpx.Response = desk.client.post(f"/batches/{batch['id']}/cancel")
    assert (response.status_code, response.headers["x-should-retry"]) == (409, "false")
    assert ended["status"] in response.json()["error"]["message"]


def test_cancel_in_the_last_moment_comes_too_late(desk, requests):
    batch = desk.create(requests(3, "local:echo?delay=10"))
    assert desk.look(batch["id"], 9.5)["status"] == "finalizing"
    assert desk.client.post(f"/batches/{batch['id']}/cancel").json()["status"] == "finalizing"
    assert desk.look(batch["id"], 1)["status"] == "completed"
