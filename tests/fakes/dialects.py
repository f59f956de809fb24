"""How providers that say they speak OpenAI's wire format deviate from it: one frozen row each.

Sources: the providers' documentation, SDKs and specs, and recorded traffic. Where a source is thin (Nebius,
SiliconFlow, Novita) the row is what was seen, not a promise.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OPENAI_ENDPOINTS = frozenset(
    f"/v1/{name}"
    for name in (
        "responses",
        "chat/completions",
        "embeddings",
        "completions",
        "moderations",
        "images/generations",
        "images/edits",
        "videos",
    )
)
CHAT = frozenset({"/v1/chat/completions"})
HOURS_24 = "24h"


def _prefixed(kind: str, number: int) -> str:
    return f"file-{number:08d}" if kind == "file" else f"batch_{number:08d}"


def _uuid(kind: str, number: int) -> str:
    return str(UUID(int=(0x4000 << 64) | (0x8000 << 48) | number, version=4))


def _unified(kind: str, number: int) -> str:
    """LiteLLM's opaque ids: long base64 with its padding, as in `bGl0ZWxsbV9wcm94eTo…==`."""
    name = f"litellm_proxy:{kind};unified_id,{number:032d};target_model_names,gpt-5-mini;llm_output_file_id,x"
    return base64.urlsafe_b64encode(name.ljust(len(name) + (-len(name) + 1) % 3, "x").encode()).decode()


@dataclass(frozen=True)
class Dialect:
    """The ways in which a server may differ; the defaults are OpenAI's own behaviour."""

    name: str
    base_path: str = "/v1"
    key_headers: tuple[str, ...] = ("authorization",)
    make_id: Callable[[str, int], str] = _prefixed
    # files
    upload_wrapped: bool = False  # {"code": 20000, "data": {file}}
    upload_validated: bool = False  # bad lines are refused at upload
    upload_looks: int = 0  # retrieves until a file is `processed`; a create before that is refused
    expiry_fields: Literal["bracket", "dotted", "refused"] = "bracket"
    max_bytes: int = 200_000_000
    max_rows: int = 50_000
    # create
    endpoints: frozenset[str] | None = OPENAI_ENDPOINTS  # None: any
    windows: str = HOURS_24  # regular expression
    create_options: frozenset[str] = frozenset({"output_expires_after"})
    idempotency_key: bool = False
    mixed_models: bool = False
    bare_lines: bool = False  # lines are {custom_id, body} only
    metadata_lists: bool = False  # metadata values may be lists
    # the batch object
    statuses: Mapping[str, str] = field(default_factory=dict)  # by OpenAI's word, where it is another
    capitalised: bool = False
    times: Literal["unix", "iso"] = "unix"
    no_file: str | None = None  # what stands for "no file"
    errors: Literal["object", "list", "text"] = "object"
    counts: Literal["nested", "flat", "late", "null", "null members"] = "nested"
    usage: bool = False
    model: bool = False
    hides_endpoint: bool = False
    empty_error_file: bool = False  # a finished batch has a 0-byte error file
    # results
    line_ids: bool = True
    request_ids: bool = True
    unwrapped: bool = False  # `response` is the response body itself
    failures: Literal["response", "error"] = "response"  # where a row's HTTP failure stands
    results_route: bool = False  # GET /batches/{id}/results
    # list and cancel
    cancel: Literal["POST", "DELETE"] = "POST"
    paging: Literal["after", "cursor"] = "after"
    list_limit: int = 20
    filters: frozenset[str] = frozenset()
    refusals: Literal["openai", "code"] = "openai"  # {"error": {…}} or {"code", "message", "data"}


OPENAI = Dialect("openai", usage=True, model=True)
AZURE = Dialect(
    "azure",
    base_path="/openai/v1",
    key_headers=("api-key", "authorization"),
    upload_looks=1,
    expiry_fields="dotted",
    max_rows=100_000,
    endpoints=OPENAI_ENDPOINTS | {"/chat/completions"},
    capitalised=True,
    times="iso",
    no_file="",
    counts="null members",
    hides_endpoint=True,
    empty_error_file=True,
    line_ids=False,
)
GROQ = Dialect(
    "groq",
    base_path="/openai/v1",
    endpoints=CHAT,
    windows=r"24h|[2-7]d|(2[4-9]|[3-9]\d|1[0-5]\d|16[0-8])h",
    create_options=frozenset(),
    errors="list",
    paging="cursor",
)
PERPLEXITY = Dialect(
    "perplexity",
    endpoints=frozenset({"/v1/responses"}),
    create_options=frozenset(),
    upload_validated=True,
    expiry_fields="refused",
    idempotency_key=True,
)
DEEPINFRA = Dialect(
    "deepinfra",
    base_path="/v1/openai",
    endpoints=CHAT | {"/v1/completions", "/v1/embeddings"},
    failures="error",
    request_ids=False,
)
NEBIUS = Dialect(
    "nebius", make_id=_uuid, statuses={"completed": "done"}, counts="late", unwrapped=True, failures="error"
)
SILICONFLOW = Dialect(
    "siliconflow",
    endpoints=CHAT,
    windows=r"(2[4-9]|[3-9]\d|[12]\d\d|3[0-2]\d|33[0-6])h",
    create_options=frozenset({"replace"}),
    upload_wrapped=True,
    statuses={"validating": "in_queue"},
    counts="null",
    refusals="code",
)
NOVITA = Dialect(
    "novita",
    base_path="/openai/v1",
    endpoints=CHAT | {"/v1/completions"},
    windows="48h",
    bare_lines=True,
    statuses={name: name.upper() for name in ("validating", "completed", "failed", "expired", "cancelling")}
    | {"cancelled": "CANCELLED", "in_progress": "PROGRESS", "finalizing": "PROGRESS"},
    times="iso",
    no_file="",
    errors="text",
    counts="flat",
)
DASHSCOPE = Dialect(
    "dashscope",
    base_path="/compatible-mode/v1",
    endpoints=CHAT | {"/v1/embeddings", "/v1/chat/ds-test"},
    windows=r"(2[4-9]|[3-9]\d|[12]\d\d|3[0-2]\d|33[0-6])h|([1-9]|1[0-4])d",
    max_bytes=500_000_000,
    filters=frozenset({"ds_name", "input_file_ids", "status", "create_after", "create_before"}),
)
MOONSHOT = Dialect("moonshot", endpoints=CHAT, windows=r"(1[2-9]|[2-9]\d|1[0-5]\d|16[0-8])h|[1-7]d")
ZHIPU = Dialect(
    "zhipu",
    base_path="/api/paas/v4",
    endpoints=frozenset({"/v4/chat/completions", "/v4/embeddings"}),
    create_options=frozenset({"auto_delete_input_file"}),
    max_bytes=100_000_000,
    list_limit=10,
)
PARASAIL = Dialect("parasail", mixed_models=True, max_bytes=500_000_000)
DOUBLEWORD = Dialect(
    "doubleword",
    windows="1h|24h|background",
    filters=frozenset({"search", "status", "created_after", "created_before", "active_first"}),
)
CEREBRAS = Dialect(
    "cerebras",
    endpoints=CHAT,
    statuses={"validating": "queued"},
    errors="text",
    cancel="DELETE",
    results_route=True,
    metadata_lists=True,
)
LITELLM = Dialect("litellm", make_id=_unified, endpoints=None)
COMPATIBLE = replace(OPENAI, name="openai-compatible", usage=False, model=False)

DIALECTS: Mapping[str, Dialect] = {
    row.name: row
    for row in (
        OPENAI, AZURE, GROQ, PERPLEXITY, DEEPINFRA, NEBIUS, SILICONFLOW, NOVITA, DASHSCOPE, MOONSHOT, ZHIPU,
        PARASAIL, DOUBLEWORD, CEREBRAS, LITELLM, COMPATIBLE,
    )
}  # fmt: skip
