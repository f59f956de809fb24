"""Plain Python, as its users write it: every name from `anybatch`, every type as the docs say."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, assert_type

import anybatch
from anybatch import (
    Account,
    AsyncClient,
    Batch,
    BatchResult,
    BatchStatus,
    Client,
    Job,
    Ledger,
    Outcome,
    Page,
    Provider,
    Report,
    RetryPolicy,
    Row,
    RowsLackingError,
    Standing,
    build_requests,
    join_results,
    read_results,
    run_job,
)


def operations(path: Path) -> None:
    batch = anybatch.create_batch("openai", str(path), "/v1/chat/completions", metadata={"team": "a"})
    assert_type(batch, Batch)
    assert_type(batch.status, BatchStatus)
    assert_type(batch.status.is_terminal, bool)
    assert_type(anybatch.retrieve_batch("openai", batch.id, api_key="k"), Batch)
    assert_type(anybatch.cancel_batch("openai", batch.id), Batch)
    page = anybatch.list_batches("openai", limit=10)
    assert_type(page, Page)
    assert_type([one.id for one in page], list[str])
    assert_type(anybatch.retrieve_batch_results("openai", batch.id), BatchResult)


async def operations_awaited(path: Path) -> None:
    assert_type(await anybatch.acreate_batch("openai", str(path), "/v1/embeddings"), Batch)
    assert_type(await anybatch.alist_batches("openai"), Page)
    assert_type(await anybatch.aretrieve_batch_results("openai", "b"), BatchResult)
    assert_type(await anybatch.arun_job("openai", path, "out", max_rounds=2), Report)


def whole_job(table: list[dict[str, Any]]) -> None:
    requests = build_requests(table, "What is {text}?", model="gpt-4o-mini", id_column="id", temperature=0)
    try:
        report = run_job("openai", requests, "out", on_partial="fail", timeout=3600.0, price=(0.075, 0.3))
    except RowsLackingError as error:
        assert_type(error.report, Report | None)
        return
    assert_type(report, Report)
    assert_type(report.counts[Outcome.SUCCEEDED], int)
    for row in read_results(report):
        assert_type(row, Row)
        if row.result is not None:
            assert_type(row.outcome, Outcome)
    for joined in join_results(table, report, id_column="id"):
        print(joined["content"])


def client_of_one_account(job: Job) -> None:
    with Client("azure", api_key="k", api_base="my-resource", retry=RetryPolicy(attempts=3)) as client:
        assert_type(client.account, Account)
        assert_type(client.provider, Provider)
        standing = client.submit(job)
        assert_type(standing, Standing)
        assert_type(standing[0], Batch)
        assert_type(standing.come_back_at, float | None)
        assert_type(client.wait(standing[0].id, timeout=60), Batch)
        assert_type(client.resume(job), Standing)
        assert_type(client.stop(job), Standing)
        assert_type(client.collect(job), Report)
        assert_type(client.run(job, on_timeout="land_partial", max_failed_ratio=0.1), Report)
        assert_type(client.results("b"), Iterator[Row])
    assert_type(job.ledger(), Ledger | None)
    assert_type(job.report(), Report | None)


async def client_awaited(job: Job) -> None:
    async with AsyncClient("anthropic") as client:
        assert_type(await client.run(job), Report)
        assert_type(await client.wait("b", deadline=1.0), Batch)
        assert_type(client.results("b"), AsyncIterator[Row])


def wrong_values(job: Job) -> None:
    """What a checker has to refuse: without the error these comments are errors themselves."""
    run_job("openai", "in.jsonl", "out", on_timeout="forget")  # type: ignore[arg-type]
    run_job("openai", "in.jsonl", "out", max_round=2)  # type: ignore[call-arg]
    Job(input="in.jsonl", output="out", on_lost="ignore")  # type: ignore[arg-type]
    job.max_rounds = 2  # type: ignore[misc]
