"""Request lines on their way out, result lines on their way in: pure functions of one line or one shard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from .reading import decode_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ..errors import Problem
    from ..models import Row


class Codec(ABC):
    """How a provider writes a request and a result. Nothing in it sends, waits or keeps state.

    `verbatim` says that request lines are uploaded byte for byte, so that `encode` is not called;
    `decodes_as_openai` that a successful result line in OpenAI's shape means what it means there, so that
    `decode` need not be called for it.
    """

    verbatim: bool = False
    decodes_as_openai: bool = False

    def encode(self, line: Mapping[str, Any], endpoint: str, *, drop: bool = False) -> Mapping[str, Any]:
        """The uploaded form of one request line.

        Raises ValueError for what this provider cannot take (`messages.Untranslatable` names the parameter);
        with `drop` such parameters are left out.
        """
        return line

    @abstractmethod
    def decode(self, record: dict[str, Any], endpoint: str | None) -> Row:
        """One result line as a row; `raw` is filled in by the caller. Raises ValueError for nonsense."""

    def original_ids(self, custom_ids: Sequence[str]) -> dict[str, str]:
        """Uploaded id -> custom_id, for ids that had to be changed to fit the provider."""
        return {}

    def check_shard(self, lines: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Problem]:
        """What is wrong with a batch that only all of its lines show, such as rows of different shapes.

        `lines` are the line numbers of the input with the uploaded form of each; a problem names the line
        that it is about. A codec that overrides this has each shard read once more while it is planned.
        """
        return iter(())


class OpenAICodec(Codec):
    """OpenAI's lines, sent and taken as they are."""

    verbatim = True
    decodes_as_openai = True

    def decode(self, record: dict[str, Any], endpoint: str | None) -> Row:
        return decode_record(record)


class BareCodec(OpenAICodec):
    """OpenAI's lines without their envelope: `{"custom_id", "body"}`."""

    verbatim = False

    def encode(self, line: Mapping[str, Any], endpoint: str, *, drop: bool = False) -> Mapping[str, Any]:
        return {"custom_id": line["custom_id"], "body": line["body"]}
