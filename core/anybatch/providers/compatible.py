"""The providers that speak OpenAI's wire format: one row of data each, which holds their deviations."""

from __future__ import annotations

from .account import resolve_account
from .openai import Dialect, OpenAIFormat
from .traits import AccountSpec, Given, Limits, Traits

_CHAT = "/v1/chat/completions"
_COMPLETIONS = "/v1/completions"
_EMBEDDINGS = "/v1/embeddings"
_RESPONSES = "/v1/responses"

_EXPIRY = frozenset({"input_expires_after", "output_expires_after"})

# As an option of the create alone, it would be missing from the upload and from all later calls.
_LITELLM_ROUTE = "every call about a batch must name it: put it into api_base, http://localhost:4000/azure/v1"


def azure_base(endpoint: str) -> str:
    """Return the base URL of an Azure resource (`https://RESOURCE.openai.azure.com`): it adds /openai/v1."""
    base = endpoint.rstrip("/")
    return base if "/openai" in base else f"{base}/openai/v1"


DIALECTS: dict[str, Dialect] = {
    row.traits.name: row
    for row in (
        Dialect(
            Traits(
                name="openai",
                account=AccountSpec("https://api.openai.com/v1", ("OPENAI_API_KEY",), ("OPENAI_BASE_URL",)),
                one_model=True,
                create_options=_EXPIRY,
                console=(
                    "https://platform.openai.com/batches",
                    "https://platform.openai.com/batches/{batch_id}",
                ),
            ),
            env_headers=(("OPENAI_ORG_ID", "OpenAI-Organization"), ("OPENAI_PROJECT_ID", "OpenAI-Project")),
        ),
        Dialect(
            Traits(
                name="azure",
                account=AccountSpec(
                    None,  # https://RESOURCE.openai.azure.com/openai/v1
                    ("AZURE_OPENAI_API_KEY",),
                    ("AZURE_OPENAI_ENDPOINT",),
                    key_header="api-key",
                    key_prefix="",
                    read_base=azure_base,
                ),
                limits=Limits(requests=100_000),
                one_model=True,
                create_options=frozenset({*_EXPIRY, "input_blob", "output_folder"}),
                list_options=frozenset({"$filter", "$orderby"}),
                poll_seconds=(60.0, 300.0),  # "poll at most once a minute", Azure how-to
            ),
            file_becomes_ready=True,
            expiry_fields="expires_after.{}",
        ),
        Dialect(
            Traits(
                name="groq",
                account=AccountSpec("https://api.groq.com/openai/v1", ("GROQ_API_KEY",), ("GROQ_BASE_URL",)),
                limits=Limits(bytes=100_000_000),  # the guide says 200 MB, the SDK says 100 MB
                list_options=frozenset({"id"}),
                console=("https://console.groq.com/dashboard/batch", None),
            ),
            pages_by_cursor=True,
        ),
        Dialect(
            Traits(
                name="perplexity",
                account=AccountSpec("https://api.perplexity.ai/v1", ("PERPLEXITY_API_KEY",)),
                endpoints=frozenset({_RESPONSES}),
                idempotent_create=True,
            ),
            idempotency_header="Idempotency-Key",
        ),
        Dialect(
            Traits(
                name="deepinfra",
                account=AccountSpec(
                    "https://api.deepinfra.com/v1/openai", ("DEEPINFRA_API_KEY", "DEEPINFRA_TOKEN")
                ),
                endpoints=frozenset({_CHAT, _COMPLETIONS, _EMBEDDINGS}),
            ),
        ),
        Dialect(
            Traits(
                name="nebius",
                account=AccountSpec("https://api.tokenfactory.nebius.com/v1", ("NEBIUS_API_KEY",)),
            ),
        ),
        Dialect(
            Traits(
                name="siliconflow",
                account=AccountSpec(
                    "https://api.siliconflow.cn/v1", ("SILICONFLOW_API_KEY",), ("SILICONFLOW_BASE_URL",)
                ),
                create_options=frozenset({"replace"}),
            ),
        ),
        Dialect(
            Traits(
                name="novita",
                account=AccountSpec("https://api.novita.ai/openai/v1", ("NOVITA_API_KEY",)),
                endpoints=frozenset({_CHAT, _COMPLETIONS}),
                one_model=True,
            ),
            bare_lines=True,
        ),
        Dialect(
            Traits(
                name="dashscope",
                account=AccountSpec(
                    "https://dashscope.aliyuncs.com/compatible-mode/v1",
                    ("DASHSCOPE_API_KEY",),
                    ("DASHSCOPE_BASE_URL",),
                ),
                limits=Limits(bytes=500_000_000),
                list_options=frozenset(
                    {"ds_name", "input_file_ids", "status", "create_after", "create_before"}
                ),
            ),
        ),
        Dialect(
            Traits(
                name="moonshot",
                account=AccountSpec(
                    "https://api.moonshot.cn/v1", ("MOONSHOT_API_KEY",), ("MOONSHOT_BASE_URL",)
                ),
                endpoints=frozenset({_CHAT}),
            ),
        ),
        Dialect(
            Traits(
                name="zhipu",
                account=AccountSpec(
                    "https://open.bigmodel.cn/api/paas/v4",
                    ("ZHIPUAI_API_KEY", "ZAI_API_KEY"),
                    ("ZHIPUAI_BASE_URL",),
                ),
                limits=Limits(bytes=100_000_000),
                create_options=frozenset({"auto_delete_input_file"}),
            ),
        ),
        Dialect(
            Traits(
                name="parasail",
                account=AccountSpec("https://api.parasail.io/v1", ("PARASAIL_API_KEY",)),
                limits=Limits(bytes=500_000_000),
            ),
        ),
        Dialect(
            Traits(
                name="doubleword",
                account=AccountSpec("https://api.doubleword.ai/v1", ("DOUBLEWORD_API_KEY",)),
                list_options=frozenset(
                    {"search", "status", "created_after", "created_before", "active_first"}
                ),
                console=(
                    "https://app.doubleword.ai/batches",
                    "https://app.doubleword.ai/batches/{batch_id}",
                ),
            ),
        ),
        Dialect(
            Traits(
                name="cerebras",
                account=AccountSpec("https://api.cerebras.ai/v1", ("CEREBRAS_API_KEY",)),
            ),
            cancel_by_delete=True,
        ),
        Dialect(
            Traits(
                name="litellm",
                account=AccountSpec(
                    "http://localhost:4000/v1",
                    ("LITELLM_API_KEY", "LITELLM_PROXY_API_KEY"),
                    ("LITELLM_API_BASE", "LITELLM_PROXY_API_BASE"),
                    needs_key=False,
                ),
                one_model=True,
                create_options=_EXPIRY,
                list_options=frozenset({"target_model_names"}),
                not_options={"custom_llm_provider": _LITELLM_ROUTE},
            ),
        ),
        Dialect(
            Traits(
                name="openai-compatible",
                account=AccountSpec(
                    None, ("OPENAI_COMPATIBLE_API_KEY",), ("OPENAI_COMPATIBLE_API_BASE",), needs_key=False
                ),
                create_options=_EXPIRY,
            ),
        ),
    )
}


class Compatible(OpenAIFormat):
    """An account at a provider of `DIALECTS`."""

    @classmethod
    def traits_of(cls, name: str) -> Traits:
        return DIALECTS[name].traits

    @classmethod
    def open(cls, name: str, given: Given) -> Compatible:
        return cls(resolve_account(name, cls.traits_of(name).account, given), DIALECTS[name])
