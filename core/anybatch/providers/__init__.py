"""The providers by name: built in, or registered by another package.

A package adds one through the entry-point group `anybatch.providers`: the name is the provider's, the value
`module:attribute` a callable `(name, api_key, api_base) -> Provider`.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from enum import StrEnum
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeAlias, cast

from ..errors import UnknownProviderError
from .keys import hides_key

if TYPE_CHECKING:
    from .base import Provider

__all__ = ["ENTRY_POINT_GROUP", "LLMProvider", "get_provider", "provider_names"]

ENTRY_POINT_GROUP = "anybatch.providers"

OpenProvider: TypeAlias = "Callable[[str, str | None, str | None], Provider]"


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
    LLMProvider.ANTHROPIC: "anybatch.providers.anthropic:Anthropic.open",
    LLMProvider.LOCAL: "anybatch.providers.local:Local.open",
    LLMProvider.MISTRAL: "anybatch.providers.mistral:Mistral.open",
}
_COMPATIBLE = "anybatch.providers.compatible:Compatible.open"


def provider_names() -> list[str]:
    """Every name that `get_provider` takes, sorted."""
    return sorted({*LLMProvider, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


@hides_key
def get_provider(name: str, *, api_key: str | None = None, api_base: str | None = None) -> Provider:
    """The account at a provider. Raises UnknownProviderError, MissingKeyError, ConfigurationError."""
    if name in _OWN_FORMATS:
        return _load(_OWN_FORMATS[LLMProvider(name)])(name, api_key, api_base)
    if name in set(LLMProvider):
        return _load(_COMPATIBLE)(name, api_key, api_base)
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return cast("OpenProvider", point.load())(name, api_key, api_base)
    known = provider_names()
    near = get_close_matches(name.lower(), known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UnknownProviderError(
        f"unknown provider {name!r}.{hint} Known: {', '.join(known)}. "
        "Any other server with OpenAI's batch API is 'openai-compatible' with its api_base."
    )


def _load(target: str) -> OpenProvider:
    module, _, path = target.partition(":")
    found: object = import_module(module)
    for attribute in path.split("."):
        found = getattr(found, attribute)
    return cast("OpenProvider", found)
