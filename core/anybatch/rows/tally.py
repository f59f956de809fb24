"""Add up the rows of a job: outcomes, models, tokens, cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..models import Outcome, TokenUsage

__all__ = ["Tally", "tokens"]


@dataclass(slots=True)
class Tally:
    """The sums over the rows of a job.

    Attributes:
        counts: The number of rows by outcome.
        unexpected: The number of stray lines.
        models: The models that answered, in order of appearance.
        input_tokens: Tokens of the requests, cached ones included.
        output_tokens: Tokens of the answers.
        total_tokens: All tokens, as the provider counts them.
        cached_tokens: Tokens of the requests that were read from the provider's cache.
        cost: USD, if the provider reports it.
    """

    counts: Counter[Outcome] = field(default_factory=Counter)
    unexpected: int = 0
    models: dict[str, None] = field(default_factory=dict)
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    cost: float | None = None

    def add_body(self, body: dict[str, Any]) -> None:
        """Add one response's model and tokens."""
        model, usage = body.get("model"), body.get("usage")
        if isinstance(model, str):
            self.models[model] = None
        if isinstance(usage, dict):
            into, out, total, cached = tokens(usage)
            self.input_tokens += into
            self.output_tokens += out
            self.total_tokens += total
            self.cached_tokens += cached
            if (cost := usage.get("cost")) is not None and isinstance(cost, int | float):
                self.cost = (self.cost or 0.0) + cost

    def add(self, other: Tally) -> None:
        """Add the sums over other rows."""
        self.counts += other.counts
        self.unexpected += other.unexpected
        self.models |= other.models
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.total_tokens += other.total_tokens
        self.cached_tokens += other.cached_tokens
        if other.cost is not None:
            self.cost = (self.cost or 0.0) + other.cost

    def cost_at(self, price: tuple[float, float] | None) -> float | None:
        """Return the cost in USD: as the provider reports it, else from `price`, else None.

        `price` is USD per million input tokens and per million output tokens.
        """
        if self.cost is not None or price is None:
            return self.cost
        return (self.input_tokens * price[0] + self.output_tokens * price[1]) / 1e6

    @property
    def usage(self) -> TokenUsage:
        """The tokens, as the report holds them."""
        return TokenUsage(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            total_tokens=self.total_tokens,
            cached_tokens=self.cached_tokens,
        )


def tokens(usage: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return the (input, output, total, cached) tokens of one response in any of the known shapes.

    Anthropic's `input_tokens` exclude tokens read from or written to its cache. They are included here, as in
    OpenAI's `prompt_tokens`; also if a gateway (LiteLLM) sends Anthropic's members beside OpenAI's.
    """
    read = usage.get("cache_read_input_tokens")
    if "prompt_tokens" in usage:
        input_tokens, output = _count(usage["prompt_tokens"]), usage.get("completion_tokens")
        details = usage.get("prompt_tokens_details")
    else:
        excluded = _count(read) + _count(usage.get("cache_creation_input_tokens"))
        input_tokens, output = _count(usage.get("input_tokens")) + excluded, usage.get("output_tokens")
        details = usage.get("input_tokens_details")
    cached = read or (details.get("cached_tokens") if isinstance(details, dict) else 0)
    output_tokens = _count(output)
    total = max(_count(usage.get("total_tokens")), input_tokens + output_tokens)
    return input_tokens, output_tokens, total, _count(cached)


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
