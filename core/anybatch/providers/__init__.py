"""The providers by name: built in, or registered by another package.

A package adds one through the entry-point group `anybatch.providers`: the name is the provider's, the value
`module:attribute` a subclass of `Provider` (docs/providers.md tells how to write one).
"""

from __future__ import annotations

from difflib import get_close_matches
from enum import StrEnum
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, cast

from ..errors import UnknownProviderError
from .keys import hides_key
from .traits import AccountSpec, Cancel, Given, Limits, Lookup, Results, Setting, Traits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .account import Account
    from .auth import HeaderAuth, HostAuth
    from .base import NewBatch, Provider, Sought
    from .calls import delete, get, post, post_lines, wait_until
    from .codec import BareCodec, Codec, OpenAICodec
    from .content import Content
    from .saving import download_files, get_without, result_file, save_lines, save_member, save_pages

__all__ = [
    "ENTRY_POINT_GROUP",
    "Account",
    "AccountSpec",
    "BareCodec",
    "Cancel",
    "Codec",
    "Content",
    "Given",
    "HeaderAuth",
    "HostAuth",
    "LLMProvider",
    "Limits",
    "Lookup",
    "NewBatch",
    "OpenAICodec",
    "Provider",
    "Results",
    "Setting",
    "Sought",
    "Traits",
    "delete",
    "download_files",
    "get",
    "get_provider",
    "get_without",
    "open_provider",
    "post",
    "post_lines",
    "provider_names",
    "result_file",
    "save_lines",
    "save_member",
    "save_pages",
    "settings_of",
    "split_settings",
    "wait_until",
]

# What a provider is written with is imported when it is first asked for, like anybatch's own names.
_HOMES = {
    name: module
    for module, names in {
        "account": ("Account",),
        "auth": ("HeaderAuth", "HostAuth"),
        "base": ("NewBatch", "Provider", "Sought"),
        "calls": ("delete", "get", "post", "post_lines", "wait_until"),
        "codec": ("BareCodec", "Codec", "OpenAICodec"),
        "content": ("Content",),
        "saving": (
            "download_files",
            "get_without",
            "result_file",
            "save_lines",
            "save_member",
            "save_pages",
        ),
    }.items()
    for name in names
}

ENTRY_POINT_GROUP = "anybatch.providers"


class LLMProvider(StrEnum):
    """The providers that come with anybatch."""

    ANTHROPIC = "anthropic"
    AZURE = "azure"
    CEREBRAS = "cerebras"
    DASHSCOPE = "dashscope"
    DEEPINFRA = "deepinfra"
    DOUBLEWORD = "doubleword"
    GROQ = "groq"
    LITELLM = "litellm"
    LOCAL = "local"
    MISTRAL = "mistral"
    MOONSHOT = "moonshot"
    NEBIUS = "nebius"
    NOVITA = "novita"
    OPENAI = "openai"
    OPENAI_COMPATIBLE = "openai-compatible"
    PARASAIL = "parasail"
    PERPLEXITY = "perplexity"
    SILICONFLOW = "siliconflow"
    ZHIPU = "zhipu"


# The wire formats of their own; all other built-in names are rows of `compatible.DIALECTS`.
_OWN_FORMATS = {
    LLMProvider.ANTHROPIC: "anybatch.providers.anthropic:Anthropic",
    LLMProvider.LOCAL: "anybatch.providers.local:Local",
    LLMProvider.MISTRAL: "anybatch.providers.mistral:Mistral",
}
_COMPATIBLE = "anybatch.providers.compatible:Compatible"


def provider_names() -> list[str]:
    """Every name that `get_provider` takes, sorted."""
    return sorted({*LLMProvider, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


@hides_key
def get_provider(
    name: str, *, api_key: str | None = None, api_base: str | None = None, **settings: str | None
) -> Provider:
    """The account at a provider; `settings` are what its account has beside key and base URL.

    Raises UnknownProviderError, UnknownOptionError, MissingKeyError, ConfigurationError.
    """
    return open_provider(name, Given(api_key, api_base, settings))


def open_provider(name: str, given: Given) -> Provider:
    """`get_provider` for settings that come as a mapping, from a connection or a file: whatever name somebody
    has written there, it is a setting or refused."""
    return _class_of(name).open(name, given)


def settings_of(name: str) -> tuple[Setting, ...]:
    """What an account at this provider has beside key and base URL. Raises UnknownProviderError."""
    return _class_of(name).traits_of(name).account.settings


def split_settings(name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments as the settings of the provider's account, and all others: the options of a call."""
    known = {setting.name for setting in settings_of(name)}
    return (
        {key: value for key, value in given.items() if key in known},
        {key: value for key, value in given.items() if key not in known},
    )


def _class_of(name: str) -> type[Provider]:
    if name in set(LLMProvider):
        return _load(_OWN_FORMATS.get(LLMProvider(name), _COMPATIBLE))
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return cast("type[Provider]", point.load())
    known = provider_names()
    near = get_close_matches(name.lower(), known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UnknownProviderError(
        f"unknown provider {name!r}.{hint} Known: {', '.join(known)}. "
        "Any other server with OpenAI's batch API is 'openai-compatible' with its api_base."
    )


def _load(target: str) -> type[Provider]:
    module, _, attribute = target.partition(":")
    return cast("type[Provider]", getattr(import_module(module), attribute))


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__
