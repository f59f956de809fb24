"""A batch before it exists: what an upload and a create need, and how to recognise what they made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .traits import DEFAULT_WINDOW

if TYPE_CHECKING:
    from .content import Content


@dataclass(frozen=True, slots=True)
class NewBatch:
    """Everything that an upload and a create need.

    Attributes:
        content: The request lines, in their uploaded form.
        endpoint: The endpoint of the requests.
        completion_window: How long the provider may take, such as `24h`.
        metadata: The metadata of the batch.
        options: The provider's own options for the create.
        models: The models that the requests name.
        key: A key of anybatch's own for names, ids and idempotency keys: at most 63 letters, digits and
            hyphens. It is new for each upload. For a create it is unique, and the same whenever the create of
            the same shard from the same upload is repeated.
    """

    content: Content
    endpoint: str
    completion_window: str = DEFAULT_WINDOW
    metadata: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    key: str = ""

    @property
    def rows(self) -> int:
        """The number of requests."""
        return self.content.rows

    def sought(self, file_id: str | None) -> Sought:
        """Return the facts by which this batch is recognised if its create gets no answer.

        Args:
            file_id: The uploaded file.

        Returns:
            The facts, for `Provider.matches`.
        """
        return Sought(file_id, self.metadata, self.key, self.endpoint, self.rows)


@dataclass(frozen=True, slots=True)
class Sought:
    """A batch that a create may have left, described by what it was created from.

    Attributes:
        file_id: Its uploaded input file.
        metadata: Its metadata.
        key: The key of its create (`NewBatch.key`).
        endpoint: The endpoint of its requests.
        rows: The number of its requests.
    """

    file_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    endpoint: str | None = None
    rows: int | None = None
