"""The Mistral fake."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.driving import (
    CHAT,
    FIVE,
    Json,
    chat,
    get,
    jsonl,
    mistral_job,
    rows,
    serving,
)
from tests.fakes.mistral import MistralFake
from tests.fakes.rows import Failure


def test_mistral_job_from_upload_to_results() -> None:
    fake = MistralFake()
    with serving(fake) as (_, client):
        job = mistral_job(client, *FIVE, model="mistral-small-latest", metadata={"k": "v"}).json()
        assert (job["status"], job["metadata"]) == ("QUEUED", {"k": "v"})
        url = f"/v1/batch/jobs/{job['id']}"
        assert client.get(url).json()["status"] == "RUNNING"
        fake.finish(job["id"], failed=2, failure=Failure(429, message="Rate limited"))
        done = client.get(url, params={"inline": "true"}).json()
        counts = [done[f"{name}_requests"] for name in ("total", "completed", "succeeded", "failed")]
        assert (done["status"], counts, len(done["outputs"])) == ("SUCCESS", [5, 5, 3, 2], 5)
        assert done["errors"] == [{"message": "Rate limited", "count": 2}]
        error = rows(client.get(f"/v1/files/{done['error_file']}/content").content)
        assert error[0]["response"] == {"status_code": 429, "body": None}
        assert error[0]["error"] == "Rate limited"
        signed = client.get(f"/v1/files/{done['output_file']}/url").json()["url"]
        assert len(rows(get(signed).content)) == 3
        assert client.get(signed).status_code == 400  # a key must not go there
        assert client.delete(url).json()["deleted"] is True
        assert (client.get(url).status_code, list(fake.batches)) == (404, [job["id"]])


@pytest.mark.parametrize(
    ("members", "place"),
    [
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"completion_window": "24h"}, "completion_window"),
        ({"timeout_hours": 169}, "timeout_hours"),
        ({"metadata": {"k" * 33: "v"}}, "metadata." + "k" * 33),
        ({"metadata": {"k": ""}}, "metadata.k"),
        ({"input_files": []}, "input_files"),
        ({"requests": [{"custom_id": "a", "body": {}}]}, "input_files"),
        ({"input_files": [], "requests": [{"body": {}}] * 10_001}, "requests"),
    ],
)
def test_mistral_refuses_a_bad_create(members: Json, place: str) -> None:
    with serving(MistralFake()) as (_, client):
        reply = mistral_job(client, *FIVE, **members)
        assert (reply.status_code, reply.json()["detail"][0]["loc"]) == (422, ["body", place])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{oops\n", "Invalid JSON"),
        (jsonl({"custom_id": "a"}), "Field required: body"),
        (jsonl({"custom_id": "a", "body": {}}), "Field required: model"),
        (jsonl(chat("a")), "Extra inputs are not permitted"),
        (b"", "The input is empty"),
    ],
)
def test_mistral_finds_bad_lines_later(data: bytes, message: str) -> None:
    with serving(MistralFake()) as (_, client):
        file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("x.jsonl", data)}).json()
        job = client.post("/v1/batch/jobs", json={"endpoint": CHAT, "input_files": [file["id"]]}).json()
        shown = client.get(f"/v1/batch/jobs/{job['id']}").json()
        assert (shown["status"], shown["errors"]) == ("FAILED", [{"message": message, "count": 1}])


def test_mistral_list_pages_and_filters() -> None:
    fake = MistralFake()
    with serving(fake) as (_, client):
        ids = [mistral_job(client, *FIVE, metadata={"n": str(number)}).json()["id"] for number in range(5)][
            ::-1
        ]

        def listed(**query: Any) -> list[str]:
            return [job["id"] for job in client.get("/v1/batch/jobs", params=query).json()["data"]]

        pages = [listed(page=page, page_size=2) for page in range(4)]
        assert pages == [ids[:2], ids[2:4], ids[4:], []]
        assert listed(order_by="created") == ids[::-1]
        fake.finish(ids[0])
        assert (listed(status=["SUCCESS", "FAILED"]), listed(status="CANCELLED")) == ([ids[0]], [])
        assert len(listed(n="3")) == 5
        fake.metadata_filter = True
        assert listed(n="3") == [ids[1]]
        fake.metadata_filter, fake.endless_list = False, True
        page = client.get("/v1/batch/jobs", params={"page": 9, "page_size": 2}).json()
        assert ([job["id"] for job in page["data"]], page["total"] > 20) == (ids[4:], True)


def test_mistral_inline_requests_and_ends() -> None:
    fake = MistralFake()
    requests = [{"custom_id": one["custom_id"], "body": one["body"]} for one in FIVE]
    with serving(fake) as (_, client):
        ids = [
            client.post("/v1/batch/jobs", json={"endpoint": CHAT, "requests": requests}).json()["id"]
            for _ in range(2)
        ]
        assert client.post(f"/v1/batch/jobs/{ids[0]}/cancel").json()["status"] == "CANCELLATION_REQUESTED"
        fake.cancel_now(ids[0], done=1)
        fake.expire(ids[1], done=2)
        shown = [client.get(f"/v1/batch/jobs/{one}").json() for one in ids]
        assert [one["status"] for one in shown] == ["CANCELLED", "TIMEOUT_EXCEEDED"]
        sizes = [len(rows(client.get(f"/v1/files/{one['output_file']}/content").content)) for one in shown]
        assert (sizes, client.post(f"/v1/batch/jobs/{ids[1]}/cancel").status_code) == ([1, 2], 400)
