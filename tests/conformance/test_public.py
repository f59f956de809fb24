"""The public surface: what there is, and that any-llm's users find what they know."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import anybatch

PUBLIC = """
    APIError Account AnyBatchError AsyncClient AuthenticationError BadRequestError Batch
    BatchFailedError BatchLostError BatchNotCompleteError BatchRecord BatchResult BatchStatus Body
    Client ConfigurationError CreateOutcomeUnknownError DeadlineExceededError IncompleteListingError
    InputChangedError InputError Job JobError LLMProvider Ledger LedgerConflictError MissingKeyError
    NotFoundError OrphanError Outcome Page Problem Provider QuotaError RateLimitError Report
    RequestCounts RetryPolicy Row RowError RowsLackingError ServerError Standing TokenUsage
    TransportError UnknownOptionError UnknownProviderError __version__ acancel_batch acreate_batch
    alist_batches aretrieve_batch aretrieve_batch_results arun_job build_requests cancel_batch
    create_batch get_provider join_results list_batches provider_names read_results retrieve_batch
    retrieve_batch_results run_job write_jsonl
"""
ACCOUNT = ["api_key", "api_base", "client_args"]

# any-llm's functions: positional parameters, then keywords, as its users call them.
ANY_LLM = {
    "create_batch": (
        ["provider", "input_file_path", "endpoint"],
        ["completion_window", "metadata", *ACCOUNT],
    ),
    "retrieve_batch": (["provider", "batch_id"], ACCOUNT),
    "cancel_batch": (["provider", "batch_id"], ACCOUNT),
    "list_batches": (["provider"], ["after", "limit", *ACCOUNT]),
    "retrieve_batch_results": (["provider", "batch_id"], ACCOUNT),
}


def test_all_is_sorted_complete_and_there() -> None:
    assert anybatch.__all__ == PUBLIC.split() == sorted(anybatch.__all__)
    for name in anybatch.__all__:
        assert getattr(anybatch, name) is not None
    assert set(dir(anybatch)) >= set(anybatch.__all__)


def test_nothing_public_is_missing_from_all() -> None:
    """Every error and every function of the modules behind the namespace is in it."""
    from anybatch import api, errors, whole_job

    own = {
        name
        for module in (api, errors, whole_job)
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    # What decides about errors is for the packages beside the core.
    assert own - set(anybatch.__all__) == {"Kind", "Repeat", "Wait", "classify", "error_of"}


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'create_batches'"):
        anybatch.create_batches  # noqa: B018


@pytest.mark.parametrize("prefix", ["", "a"])
@pytest.mark.parametrize("name", ANY_LLM)
def test_signatures_are_those_of_any_llm(name: str, prefix: str) -> None:
    function = getattr(anybatch, prefix + name)
    assert inspect.iscoroutinefunction(function) == bool(prefix)
    parameters = inspect.signature(function).parameters.values()
    positional = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    keywords = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    expected, known = ANY_LLM[name]
    assert positional == expected
    assert [one for one in keywords if one in known] == known
    assert {one.name: one.default for one in parameters}.get("completion_window", "24h") == "24h"
    assert all(
        one.default is None for one in parameters if one.name in (*ACCOUNT, "metadata", "after", "limit")
    )


def shape(function: Any) -> list[tuple[str, Any, Any]]:
    return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", [*ANY_LLM, "run_job"])
def test_both_forms_of_a_function_are_called_alike(name: str) -> None:
    assert shape(getattr(anybatch, name)) == shape(getattr(anybatch, f"a{name}"))
    assert getattr(anybatch, name).__doc__


def test_both_clients_have_the_same_verbs() -> None:
    def verbs(client: type) -> dict[str, list[tuple[str, Any, Any]]]:
        return {
            name: shape(value)
            for name, value in vars(client).items()
            if inspect.isfunction(value) and not name.startswith("_") and name not in ("close", "aclose")
        }

    assert verbs(anybatch.Client) == verbs(anybatch.AsyncClient)
    names = """create retrieve cancel list iter_batches wait results download submit resume stop collect
        land_batches run check"""
    assert set(verbs(anybatch.Client)) == set(names.split())
    assert shape(anybatch.Client.__init__) == shape(anybatch.AsyncClient.__init__)


def test_values_are_frozen_and_in_openai_s_shape() -> None:
    members = """id object endpoint model errors input_file_id completion_window status output_file_id
        error_file_id created_at in_progress_at expires_at finalizing_at completed_at failed_at expired_at
        cancelling_at cancelled_at request_counts usage metadata provider raw_status raw"""
    assert list(anybatch.Batch.model_fields) == members.split()
    batch = anybatch.Batch(id="b", status=anybatch.BatchStatus.FAILED, provider="openai", raw_status="failed")
    with pytest.raises(ValueError, match="frozen"):
        batch.status = anybatch.BatchStatus.COMPLETED  # type: ignore[misc]
    assert [status for status in anybatch.BatchStatus if status.is_terminal] == [
        "failed", "completed", "expired", "cancelled"
    ]  # fmt: skip
    assert list(anybatch.Outcome) == ["succeeded", "failed", "expired", "cancelled", "missing", "invalid"]


def test_bodies_are_read_like_the_sdks_types() -> None:
    body = anybatch.Body({"choices": [{"message": {"content": "hi", "tool_calls": None}}], "items": 1})
    assert body.choices[0].message.content == body["choices"][0]["message"]["content"] == "hi"
    assert body.choices[0].message.tool_calls is None
    with pytest.raises(AttributeError, match="no member 'choice'; there are choices, items"):
        body.choice  # noqa: B018
