"""The providers by name: built in, or registered by another package.

A package registers one through the entry-point group `anybatch.providers`: the entry's name is the
provider's, its value `module:attribute` a subclass of `Provider` (docs/providers.md says how to write one).

base       the interface; `newbatch` is what a create says, `checks` what is refused before anything is sent
traits     the facts about a provider; `account` and `auth` are whose batches they are, and who sees the key
codec      one line on its way out or in; `messages` and `turns` translate chat lines for Anthropic
calls      requests that most providers make; `saving` results as files, pages or one object
finding    a batch whose create got no answer
reading    answers as batches and pages, leniently
openai     OpenAI's format, with `compatible` for its dialects; `anthropic`, `mistral`, `local` have their own
"""

from __future__ import annotations

from difflib import get_close_matches
from enum import StrEnum
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, cast

from ..errors import UnknownProviderError
from .keys import hides_key
from .traits import AccountOptions, AccountSpec, Cancel, Limits, Lookup, Results, Setting, Traits

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
    "AccountOptions",
    "AccountSpec",
    "BareCodec",
    "Cancel",
    "Codec",
    "Content",
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

# The names that providers are written with are imported when they are first used, like anybatch's own.
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


# Providers with a wire format of their own; all other built-in names are rows of `compatible.DIALECTS`.
_OWN_FORMATS = {
    LLMProvider.ANTHROPIC: "anybatch.providers.anthropic:Anthropic",
    LLMProvider.LOCAL: "anybatch.providers.local:Local",
    LLMProvider.MISTRAL: "anybatch.providers.mistral:Mistral",
}
_COMPATIBLE = "anybatch.providers.compatible:Compatible"


def provider_names() -> list[str]:
    """Return the names of all providers, built in or registered.

    Returns:
        Every name that `get_provider` accepts, sorted.
    """
    return sorted({*LLMProvider, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


@hides_key
def get_provider(
    name: str, *, api_key: str | None = None, api_base: str | None = None, **settings: str | None
) -> Provider:
    """Open an account at a provider.

    Args:
        name: The provider's name.
        api_key: The API key; by default from the provider's environment variable.
        api_base: The base URL; by default the provider's own.
        settings: The account's other settings by name, such as a region.

    Returns:
        The account.

    Raises:
        UnknownProviderError: There is no provider of this name.
        UnknownOptionError: The provider has no such setting.
        MissingKeyError: There is no API key.
        ConfigurationError: Something else is missing or invalid.
    """
    return open_provider(name, AccountOptions(api_key, api_base, settings))


def open_provider(name: str, options: AccountOptions) -> Provider:
    """Open an account like `get_provider`, with settings from a mapping such as a connection or a file.

    In a mapping, every name is a setting or refused; none can be taken for another argument.

    Args:
        name: The provider's name.
        options: Key, base URL and settings.

    Returns:
        The account.

    Raises:
        ConfigurationError: See `get_provider`.
    """
    return _class_of(name).open(name, options)


def settings_of(name: str) -> tuple[Setting, ...]:
    """Return the settings of a provider's accounts beside key and base URL.

    Args:
        name: The provider's name.

    Returns:
        The settings.

    Raises:
        UnknownProviderError: There is no provider of this name.
    """
    return _class_of(name).traits_of(name).account.settings


def split_settings(name: str, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into the settings of a provider's account and the options of a call.

    Args:
        name: The provider's name.
        kwargs: The keyword arguments.

    Returns:
        The settings, and all others.

    Raises:
        UnknownProviderError: There is no provider of this name.
    """
    known = {setting.name for setting in settings_of(name)}
    return (
        {key: value for key, value in kwargs.items() if key in known},
        {key: value for key, value in kwargs.items() if key not in known},
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
