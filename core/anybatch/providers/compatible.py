"""The providers that speak OpenAI's wire format: one row of data each, their deviations and nothing else."""

from __future__ import annotations

import os

from .account import resolve_account
from .base import Limits
from .openai import Dialect, OpenAIFormat

_CHAT = "/v1/chat/completions"
_COMPLETIONS = "/v1/completions"
_EMBEDDINGS = "/v1/embeddings"
_RESPONSES = "/v1/responses"

_EXPIRY = ("input_expires_after", "output_expires_after")

# As an option of a create it would be missing from the upload, and from whatever asks for the batch later.
_LITELLM_ROUTE = (
    "all calls about a batch have to name it: put it into api_base, http://localhost:4000/azure/v1"
)

DIALECTS: dict[str, Dialect] = {
    row.name: row
    for row in (
        Dialect(
            "openai",
            "https://api.openai.com/v1",
            ("OPENAI_API_KEY",),
            ("OPENAI_BASE_URL",),
            single_model=True,
            create_options=_EXPIRY,
            env_headers=(("OPENAI_ORG_ID", "OpenAI-Organization"), ("OPENAI_PROJECT_ID", "OpenAI-Project")),
        ),
        Dialect(
            "azure",
            None,  # https://RESOURCE.openai.azure.com/openai/v1
            ("AZURE_OPENAI_API_KEY",),
            ("AZURE_OPENAI_ENDPOINT",),
            key_header="api-key",
            key_prefix="",
            limits=Limits(requests=100_000),
            single_model=True,
            file_becomes_ready=True,
            expiry_fields="expires_after.{}",
            create_options=(*_EXPIRY, "input_blob", "output_folder"),
            list_options=("$filter", "$orderby"),
            poll_seconds=(60.0, 300.0),  # "poll at most once a minute", Azure how-to
        ),
        Dialect(
            "groq",
            "https://api.groq.com/openai/v1",
            ("GROQ_API_KEY",),
            ("GROQ_BASE_URL",),
            limits=Limits(bytes=100_000_000),  # the guide says 200 MB, the SDK 100 MB
            pages_by_cursor=True,
            list_options=("id",),
        ),
        Dialect(
            "perplexity",
            "https://api.perplexity.ai/v1",
            ("PERPLEXITY_API_KEY",),
            endpoints=(_RESPONSES,),
            idempotency_header="Idempotency-Key",
        ),
        Dialect(
            "deepinfra",
            "https://api.deepinfra.com/v1/openai",
            ("DEEPINFRA_API_KEY", "DEEPINFRA_TOKEN"),
            endpoints=(_CHAT, _COMPLETIONS, _EMBEDDINGS),
        ),
        Dialect("nebius", "https://api.tokenfactory.nebius.com/v1", ("NEBIUS_API_KEY",)),
        Dialect(
            "siliconflow",
            "https://api.siliconflow.cn/v1",
            ("SILICONFLOW_API_KEY",),
            ("SILICONFLOW_BASE_URL",),
            create_options=("replace",),
        ),
        Dialect(
            "novita",
            "https://api.novita.ai/openai/v1",
            ("NOVITA_API_KEY",),
            endpoints=(_CHAT, _COMPLETIONS),
            single_model=True,
            bare_lines=True,
        ),
        Dialect(
            "dashscope",
            "https://dashscope.aliyuncs.com/compatible-mode/v1",
            ("DASHSCOPE_API_KEY",),
            ("DASHSCOPE_BASE_URL",),
            limits=Limits(bytes=500_000_000),
            list_options=("ds_name", "input_file_ids", "status", "create_after", "create_before"),
        ),
        Dialect(
            "moonshot",
            "https://api.moonshot.cn/v1",
            ("MOONSHOT_API_KEY",),
            ("MOONSHOT_BASE_URL",),
            endpoints=(_CHAT,),
        ),
        Dialect(
            "zhipu",
            "https://open.bigmodel.cn/api/paas/v4",
            ("ZHIPUAI_API_KEY", "ZAI_API_KEY"),
            ("ZHIPUAI_BASE_URL",),
            limits=Limits(bytes=100_000_000),
            create_options=("auto_delete_input_file",),
        ),
        Dialect(
            "parasail",
            "https://api.parasail.io/v1",
            ("PARASAIL_API_KEY",),
            limits=Limits(bytes=500_000_000),
        ),
        Dialect(
            "doubleword",
            "https://api.doubleword.ai/v1",
            ("DOUBLEWORD_API_KEY",),
            list_options=("search", "status", "created_after", "created_before", "active_first"),
        ),
        Dialect(
            "cerebras",
            "https://api.cerebras.ai/v1",
            ("CEREBRAS_API_KEY",),
            cancel_by_delete=True,
        ),
        Dialect(
            "litellm",
            "http://localhost:4000/v1",
            ("LITELLM_API_KEY", "LITELLM_PROXY_API_KEY"),
            ("LITELLM_API_BASE", "LITELLM_PROXY_API_BASE"),
            needs_key=False,
            single_model=True,
            create_options=_EXPIRY,
            list_options=("target_model_names",),
            not_options=(("custom_llm_provider", _LITELLM_ROUTE),),
        ),
        Dialect(
            "openai-compatible",
            None,
            ("OPENAI_COMPATIBLE_API_KEY",),
            ("OPENAI_COMPATIBLE_API_BASE",),
            needs_key=False,
            create_options=_EXPIRY,
        ),
    )
}


class Compatible(OpenAIFormat):
    """A row of `DIALECTS`, brought to life for one account."""

    @classmethod
    def open(cls, name: str, api_key: str | None, api_base: str | None) -> Compatible:
        row = DIALECTS[name]
        account = resolve_account(
            name,
            api_key=api_key,
            api_base=azure_base(api_base) if name == "azure" else api_base,
            default_base=azure_base(None) if name == "azure" else row.api_base,
            key_env=row.key_env,
            base_env=() if name == "azure" else row.base_env,
            needs_key=row.needs_key,
        )
        return cls(account, row)


def azure_base(given: str | None) -> str | None:
    """Azure names the resource (`https://RESOURCE.openai.azure.com`); its batches live under /openai/v1."""
    base = (given or os.environ.get("AZURE_OPENAI_ENDPOINT") or "").rstrip("/")
    return f"{base}/openai/v1" if base and "/openai" not in base else base or None
