"""anybatch's own wire formats pass the suite that other packages test their providers with."""

from __future__ import annotations

from typing import Any, ClassVar
from urllib.parse import parse_qs

import httpx

from anybatch import BatchStatus, get_provider
from anybatch.providers.base import Provider
from anybatch.testing import ProviderSuite
from tests.fakes.anthropic import AnthropicFake
from tests.fakes.dialects import DIALECTS
from tests.fakes.mistral import MistralFake
from tests.fakes.openai import OpenAIFake
from tests.fakes.provider import FakeProvider
from tests.fakes.server import Request

HALF = 3


class Served:
    """One of our fakes as a function of httpx's requests."""

    def __init__(self, fake: FakeProvider) -> None:
        self.fake = fake

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path, _, query = request.url.raw_path.decode().partition("?")
        headers = {name.lower(): value for name, value in request.headers.items()}
        asked = Request(
            request.method, path, parse_qs(query, keep_blank_values=True), headers, request.read()
        )
        reply = self.fake(asked)
        return httpx.Response(reply.status, headers=dict(reply.headers), content=reply.body)

    @property
    def batch_ids(self) -> list[str]:
        return list(self.fake.batches)

    def end(self, batch_id: str, status: BatchStatus) -> None:
        match status:
            case BatchStatus.COMPLETED:
                self.fake.finish(batch_id)
            case BatchStatus.EXPIRED:
                self.fake.expire(batch_id, done=HALF)
            case BatchStatus.CANCELLED:
                self.fake.cancel_now(batch_id, done=HALF)
            case _:
                self.fake.fail(batch_id, "invalid_input", "nothing of it can be read")


class OwnFormat(ProviderSuite):
    def make_fake(self) -> Served:
        return Served(OpenAIFake(DIALECTS[self.name]))

    def make_provider(self) -> Provider:
        base = "https://provider.test" + self.make_fake().fake.base_path
        return get_provider(self.name, api_key="test-key", api_base=base)


class TestOpenAI(OwnFormat):
    name = "openai"


class TestGroq(OwnFormat):
    name = "groq"  # pages by cursor


class TestCerebras(OwnFormat):
    name = "cerebras"  # cancels by DELETE


class TestPerplexity(OwnFormat):
    """A create with an idempotency key."""

    name = "perplexity"
    endpoint = "/v1/responses"

    def body(self, text: str) -> dict[str, Any]:
        return {"model": self.model, "input": text}


class TestMistral(OwnFormat):
    name = "mistral"

    def make_fake(self) -> Served:
        return Served(MistralFake())


class TestAnthropic(OwnFormat):
    name = "anthropic"
    ends: ClassVar = frozenset({BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED})

    def make_fake(self) -> Served:
        return Served(AnthropicFake())
