"""LLM batch jobs for data pipelines: paid for once, waited for without a worker, every row accounted for."""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .api import (
        acancel_batch,
        acreate_batch,
        alist_batches,
        aretrieve_batch,
        aretrieve_batch_results,
        cancel_batch,
        create_batch,
        list_batches,
        retrieve_batch,
        retrieve_batch_results,
    )
    from .async_client import AsyncClient
    from .client import Client
    from .errors import (
        AnyBatchError,
        APIError,
        AuthenticationError,
        BadRequestError,
        BatchFailedError,
        BatchLostError,
        BatchNotCompleteError,
        ConfigurationError,
        CreateOutcomeUnknownError,
        DeadlineExceededError,
        IncompleteListingError,
        InputChangedError,
        InputError,
        JobError,
        LedgerConflictError,
        MissingKeyError,
        NotFoundError,
        OrphanError,
        Problem,
        QuotaError,
        RateLimitError,
        RowsLackingError,
        ServerError,
        TransportError,
        UnknownOptionError,
        UnknownProviderError,
    )
    from .jobs.job import Job
    from .jobs.ledger import Ledger
    from .jobs.standing import Standing
    from .models import (
        Batch,
        BatchRecord,
        BatchResult,
        BatchStatus,
        Body,
        Outcome,
        Page,
        Report,
        RequestCounts,
        Row,
        RowError,
        TokenUsage,
    )
    from .providers import Account, LLMProvider, Provider, get_provider, provider_names
    from .retry import RetryPolicy
    from .rows.results import read_results
    from .rows.tables import build_requests, join_results, write_jsonl
    from .whole_job import arun_job, run_job

__all__ = [
    "APIError",
    "Account",
    "AnyBatchError",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "Batch",
    "BatchFailedError",
    "BatchLostError",
    "BatchNotCompleteError",
    "BatchRecord",
    "BatchResult",
    "BatchStatus",
    "Body",
    "Client",
    "ConfigurationError",
    "CreateOutcomeUnknownError",
    "DeadlineExceededError",
    "IncompleteListingError",
    "InputChangedError",
    "InputError",
    "Job",
    "JobError",
    "LLMProvider",
    "Ledger",
    "LedgerConflictError",
    "MissingKeyError",
    "NotFoundError",
    "OrphanError",
    "Outcome",
    "Page",
    "Problem",
    "Provider",
    "QuotaError",
    "RateLimitError",
    "Report",
    "RequestCounts",
    "RetryPolicy",
    "Row",
    "RowError",
    "RowsLackingError",
    "ServerError",
    "Standing",
    "TokenUsage",
    "TransportError",
    "UnknownOptionError",
    "UnknownProviderError",
    "__version__",
    "acancel_batch",
    "acreate_batch",
    "alist_batches",
    "aretrieve_batch",
    "aretrieve_batch_results",
    "arun_job",
    "build_requests",
    "cancel_batch",
    "create_batch",
    "get_provider",
    "join_results",
    "list_batches",
    "provider_names",
    "read_results",
    "retrieve_batch",
    "retrieve_batch_results",
    "run_job",
    "write_jsonl",
]

# Names are imported when they are first asked for: a DAG file or a code location that only mentions anybatch
# must not pay for httpx and pydantic at every parse.
_MODULES = {
    "api": (
        "acancel_batch",
        "acreate_batch",
        "alist_batches",
        "aretrieve_batch",
        "aretrieve_batch_results",
        "cancel_batch",
        "create_batch",
        "list_batches",
        "retrieve_batch",
        "retrieve_batch_results",
    ),
    "async_client": ("AsyncClient",),
    "client": ("Client",),
    "errors": (
        "APIError",
        "AnyBatchError",
        "AuthenticationError",
        "BadRequestError",
        "BatchFailedError",
        "BatchLostError",
        "BatchNotCompleteError",
        "ConfigurationError",
        "CreateOutcomeUnknownError",
        "DeadlineExceededError",
        "IncompleteListingError",
        "InputChangedError",
        "InputError",
        "JobError",
        "LedgerConflictError",
        "MissingKeyError",
        "NotFoundError",
        "OrphanError",
        "Problem",
        "QuotaError",
        "RateLimitError",
        "RowsLackingError",
        "ServerError",
        "TransportError",
        "UnknownOptionError",
        "UnknownProviderError",
    ),
    "jobs.job": ("Job",),
    "jobs.ledger": ("Ledger",),
    "jobs.standing": ("Standing",),
    "models": (
        "Batch",
        "BatchRecord",
        "BatchResult",
        "BatchStatus",
        "Body",
        "Outcome",
        "Page",
        "Report",
        "RequestCounts",
        "Row",
        "RowError",
        "TokenUsage",
    ),
    "providers": (
        "Account",
        "LLMProvider",
        "Provider",
        "get_provider",
        "provider_names",
    ),
    "retry": ("RetryPolicy",),
    "rows.results": ("read_results",),
    "rows.tables": (
        "build_requests",
        "join_results",
        "write_jsonl",
    ),
    "whole_job": ("arun_job", "run_job"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__
