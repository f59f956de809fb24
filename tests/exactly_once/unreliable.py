"""The provider that the model's attempts talk to, and how its answers can be spoilt."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from typing import Any

import httpx

from anybatch.flow import Download
from tests.fakes.openai import FakeFile, OpenAIFake
from tests.fakes.provider import FakeBatch, State
from tests.fakes.server import Reply, Request


def _half(lines: list[bytes]) -> list[bytes]:
    return lines[: len(lines) // 2]


# Each befalls one answer, as a fault, or all of them for good.
SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "short": lambda body: b"".join(_half(body.splitlines(keepends=True))),  # as if it ended here
    "torn": lambda body: body[:-20],  # in the middle of a line
    "empty": lambda body: b"",
    "unread": lambda body: b'{"object": "list", "data": [], "has_more": true}',  # a listing without its end
}


def ways_to_spoil(effect: Any) -> set[str]:
    """How the answer to this can be spoilt."""
    if isinstance(effect, Download):
        return {"short", "torn", "empty"}
    if isinstance(effect, httpx.Request) and is_listing(effect):
        return {"unread"}
    return set()


def is_listing(request: httpx.Request) -> bool:
    return request.method == "GET" and request.url.path == "/v1/batches"


@dataclass(frozen=True)
class Past:
    """What a provider holds at some time."""

    batches: dict[str, FakeBatch]
    files: dict[str, FakeFile]
    inputs: dict[str, FakeFile]


class UnreliableFake(OpenAIFake):
    """To look at a batch changes nothing here, and to cancel one ends it, where it is to `cancel_at_once`.

    A batch is in the listing `lag` seconds after it was created.
    """

    lag = 0.0
    cancel_at_once = False

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.cancel_looks = None
        self.gone: dict[str, FakeBatch] = {}

    def remember(self) -> Past:
        return Past(deepcopy(self.batches), dict(self.files), dict(self._inputs))

    def go_back(self, past: Past) -> None:
        """Be as it was then; what is made from now on has other ids."""
        self.batches = deepcopy(past.batches)
        self.files, self._inputs = dict(past.files), dict(past.inputs)
        self._numbers = count(1000)

    def lose(self, batch_id: str) -> None:
        """Know nothing of a batch any more."""
        self.gone[batch_id] = self.batches.pop(batch_id)

    def bought(self, batch: FakeBatch) -> list[str]:
        """The custom_ids that a batch was created with."""
        return [custom_id for custom_id, _ in self.requests(batch)]

    @property
    def ever(self) -> list[FakeBatch]:
        """All batches there ever were, in the order in which they were created."""
        return sorted((self.gone | self.batches).values(), key=lambda batch: batch.created_at)

    def running(self) -> list[FakeBatch]:
        return [batch for batch in self.batches.values() if not batch.is_terminal and batch.is_live]

    def unlisted_for(self, batch: FakeBatch) -> float:
        """The seconds until a batch is in the listing."""
        return max(batch.created_at + self.lag - self.clock(), 0.0)

    def _wanted(self, batch: FakeBatch, request: Request) -> bool:
        return not self.unlisted_for(batch) and super()._wanted(batch, request)

    def _cancel(self, batch: FakeBatch) -> Reply:
        reply = super()._cancel(batch)
        if not self.cancel_at_once or batch.state is not State.CANCELLING:
            return reply
        self.cancel_now(batch.id)
        return Reply.json(self._show(batch))
