"""Where a person looks at batches in a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Sequence

# By the host of the API, so that a gateway in front of it never gets a link to pages that do not show its
# batches: the page of all batches, and that of one where there is such a page. Sources: the providers' guides
# and consoles.
_CONSOLES: dict[str, tuple[str, str | None]] = {
    "api.openai.com": (
        "https://platform.openai.com/batches",
        "https://platform.openai.com/batches/{batch_id}",
    ),
    "api.anthropic.com": ("https://platform.claude.com/workspaces/default/batches", None),
    "api.mistral.ai": ("https://console.mistral.ai/build/batches", None),
    "api.groq.com": ("https://console.groq.com/dashboard/batch", None),
    "api.doubleword.ai": (
        "https://app.doubleword.ai/batches",
        "https://app.doubleword.ai/batches/{batch_id}",
    ),
}


def console_url(api_base: str, batch_ids: Sequence[str], pattern: str | None = None) -> str | None:
    """The page of these batches; None where none is known.

    `pattern` is an account's own, such as `https://gateway.example.com/batches/{batch_id}`.
    """
    if not batch_ids:
        return None
    if pattern:
        return pattern.replace("{batch_id}", quote(batch_ids[0], safe=""))
    host = urlsplit(api_base).hostname or ""
    for name, (all_batches, one_batch) in _CONSOLES.items():
        # Regional hosts, such as eu.api.openai.com, show their batches on the same pages.
        if host == name or host.endswith(f".{name}"):
            if one_batch is None or len(batch_ids) > 1:
                return all_batches
            return one_batch.replace("{batch_id}", quote(batch_ids[0], safe=""))
    return None
