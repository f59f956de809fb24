"""How a provider writes request lines and result lines: pure functions of one line or one shard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from .reading import decode_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ..errors import Problem
    from ..models import Row


class Codec(ABC):
    """How a provider writes a request and a result. A codec sends nothing, never waits and keeps no state.

    Attributes:
        verbatim: Whether request lines are uploaded byte for byte; then `encode` is not called.
        decodes_as_openai: Whether a successful result line in OpenAI's shape has OpenAI's meaning; then
            `decode` is not called for such lines.
    """

    verbatim: bool = False
    decodes_as_openai: bool = False

    def encode(self, line: Mapping[str, Any], endpoint: str, *, drop: bool = False) -> Mapping[str, Any]:
        """Return the uploaded form of one request line.

        Args:
            line: The request line, in OpenAI's shape.
            endpoint: The endpoint of the batch.
            drop: Whether to leave out parameters that have no counterpart in the provider's API.

        Returns:
            The line to upload.

        Raises:
            ValueError: The provider cannot take this line; `messages.Untranslatable` names the parameter.
        """
        return line

    @abstractmethod
    def decode(self, record: dict[str, Any], endpoint: str | None) -> Row:
        """Decode one result line.

        Args:
            record: The parsed line.
            endpoint: The endpoint of the batch, if it is known.

        Returns:
            The row; the caller fills in its `raw`.

        Raises:
            ValueError: The line is not a result of this provider.
        """

    def original_ids(self, custom_ids: Sequence[str]) -> dict[str, str]:
        """Map uploaded ids back to custom_ids.

        Args:
            custom_ids: The custom_ids of a batch.

        Returns:
            The custom_id for each uploaded id that had to differ from it.
        """
        return {}

    def check_shard(self, lines: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Problem]:
        """Check what only all lines of a batch show together, such as rows of different shapes.

        A codec that overrides this makes the planner read each shard once more.

        Args:
            lines: The line number in the input and the uploaded form of each line.

        Yields:
            The problems, each with the number of its line.
        """
        return iter(())


class OpenAICodec(Codec):
    """OpenAI's request and result lines, unchanged."""

    verbatim = True
    decodes_as_openai = True

    def decode(self, record: dict[str, Any], endpoint: str | None) -> Row:
        return decode_record(record)


class BareCodec(OpenAICodec):
    """OpenAI's lines with a smaller envelope: `{"custom_id", "body"}`."""

    verbatim = False

    def encode(self, line: Mapping[str, Any], endpoint: str, *, drop: bool = False) -> Mapping[str, Any]:
        return {"custom_id": line["custom_id"], "body": line["body"]}
