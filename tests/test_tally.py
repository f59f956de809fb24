"""What the rows of a job add up to."""

from __future__ import annotations

from typing import Any

import pytest

from anybatch.rows.tally import Tally, tokens


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}, (5, 2, 7, 0)),
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}, (5, 0, 5, 3)),
        ({"prompt_tokens": 4, "total_tokens": 4}, (4, 0, 4, 0)),
        ({"input_tokens": 5, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 3}}, (5, 2, 7, 3)),
        (
            {"input_tokens": 50, "cache_read_input_tokens": 900, "cache_creation_input_tokens": 50,
             "output_tokens": 9},
            (1000, 9, 1009, 900),
        ),
        (  # LiteLLM sends both: OpenAI's hold Anthropic's (B6)
            {"prompt_tokens": 1000, "completion_tokens": 9, "total_tokens": 1009,
             "prompt_tokens_details": {"cached_tokens": 900}, "cache_read_input_tokens": 900,
             "cache_creation_input_tokens": 50},
            (1000, 9, 1009, 900),
        ),
        ({"prompt_tokens": None, "input_tokens": "many"}, (0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_tokens_are_counted_once_whoever_tells_them(
    usage: dict[str, Any], expected: tuple[int, int, int, int]
) -> None:
    assert tokens(usage) == expected


@pytest.mark.parametrize(
    ("usage", "price", "expected"),
    [
        ({"prompt_tokens": 1_000_000}, None, None),
        ({"prompt_tokens": 1_000_000, "completion_tokens": 500_000}, (2.0, 4.0), 4.0),
        ({"prompt_tokens": 1_000_000, "cost": 0.5}, (2.0, 4.0), 0.5),
    ],
)
def test_what_the_provider_tells_of_the_cost_comes_before_a_price(
    usage: dict[str, Any], price: tuple[float, float] | None, expected: float | None
) -> None:
    tally = Tally()
    tally.add_body({"usage": usage})
    assert tally.cost_at(price) == expected
