"""What a provider would refuse, refused before anything is sent: by its traits alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, UnknownOptionError

if TYPE_CHECKING:
    from .traits import Traits


def check_create(traits: Traits, endpoint: str, window: str, metadata: Mapping[str, str]) -> None:
    """Refuse an endpoint, a completion window or metadata that the provider does not accept."""
    if traits.endpoints is not None and endpoint not in traits.endpoints:
        raise ConfigurationError(
            f"{traits.name} runs no batches on endpoint {endpoint!r}; it supports {_names(traits.endpoints)}",
            provider=traits.name,
        )
    if traits.windows is not None and window not in traits.windows:
        known = " or ".join(map(repr, traits.windows))
        raise ConfigurationError(
            f"completion_window: {traits.name} supports {known}, not {window!r}", provider=traits.name
        )
    if traits.metadata is None:
        if metadata:
            raise ConfigurationError(
                f"metadata: {traits.name} does not support metadata on batches; leave it out",
                provider=traits.name,
            )
        return
    pairs, key_length, value_length = traits.metadata
    if len(metadata) > pairs:
        raise ConfigurationError(
            f"metadata: at most {pairs} pairs, not {len(metadata)}", provider=traits.name
        )
    for key, value in metadata.items():
        if not isinstance(value, str) or len(value) > value_length or not 0 < len(key) <= key_length:
            raise ConfigurationError(
                f"metadata {key!r}: a key must have 1 to {key_length} characters, "
                f"a value must be text of at most {value_length}",
                provider=traits.name,
            )


def check_options(traits: Traits, given: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    """Refuse unknown options; `what` they are options of, for the message."""
    if unknown := sorted(set(given) - known):
        instead = traits.not_options
        hints = [f". {name}: {instead[name]}" for name in unknown if name in instead]
        raise UnknownOptionError(
            f"{traits.name} has no {what} option {', '.join(unknown)}; it has {_names(known) or 'none'}"
            + "".join(hints),
            provider=traits.name,
        )


def _names(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
