"""JSON text within bounds: what is read, what is mended, what is refused."""

import json
import math
import random
from typing import Any

import pytest

from anybatch.local.jsontext import (
    MAX_NESTING,
    UnfitError,
    encode,
    is_deeper,
    read_repaired,
    read_strict,
    shallow,
)

LEAVES: list[Any] = [
    None,
    True,
    0,
    -7,
    10**400,
    0.5,
    -1e300,
    "",
    "a",
    '"',
    "\\",
    '\\"',
    "[{",
    "}]",
    "é\u2028\n😀",
]


def some_value(draw: random.Random, levels: int = 7) -> Any:
    """A value that is as deep as chance has it, with names and texts that look like JSON's own marks."""
    below = range(draw.choice((0, 1, 1, 2))) if levels else ()
    match draw.randrange(3):
        case 0:
            return [some_value(draw, levels - 1) for _ in below]
        case 1:
            return {str(draw.choice(LEAVES)): some_value(draw, levels - 1) for _ in below}
        case _:
            return draw.choice(LEAVES)


VALUES = [some_value(random.Random(seed)) for seed in range(2000)]


def depth(value: object) -> int:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if below is None else 1 + max(map(depth, below), default=0)


def cut(value: object, levels: int) -> object:
    """`shallow`, on values."""
    if isinstance(value, dict):
        return {key: cut(below, levels - 1) for key, below in value.items()} if levels else None
    if isinstance(value, list):
        return [cut(below, levels - 1) for below in value] if levels else None
    return value


@pytest.mark.parametrize("ascii_only", [True, False])
def test_depth_is_counted_and_cut_as_the_values_have_it(ascii_only):
    """E1 of FAULTS: a row that is nested too deep is identified by what is left of its line."""
    assert {depth(value) for value in VALUES} >= set(range(6))
    for value in VALUES:
        text = json.dumps(value, ensure_ascii=ascii_only)
        for levels in range(6):
            assert is_deeper(text, levels) == (depth(value) > levels)
            assert json.loads(shallow(text, levels)) == cut(value, levels)


def test_what_is_json_is_read_as_it_is():
    for value in VALUES:
        text = json.dumps(value)
        assert read_strict(text) == read_repaired(text) == value
        assert json.loads(encode(value)) == value


def test_any_text_has_a_value_or_is_none():
    """E1 of FAULTS: reading raises nothing but ValueError."""
    draw = random.Random(1)
    read = 0
    for _ in range(20_000):
        text = "".join(draw.choices('[]{}",:\\a1 e9', k=draw.randrange(12)))
        is_deeper(text, 3)
        for one in (read_strict, read_repaired):
            try:
                one(shallow(text, 3))
                read += 1
            except ValueError:
                continue
    assert read > 100


@pytest.mark.parametrize(
    ("text", "why", "mended"),
    [
        ("[NaN]", "it holds NaN, which is not JSON", [None]),
        ("[-Infinity]", "it holds -Infinity, which is not JSON", [None]),
        ("[-1e999, 1.5]", "it holds -1e999, which is too large a number", [None, 1.5]),
        ("[1e+0999]", "it holds 1e\\+0999", [None]),
        ("[%s.5]" % ("7" * 309), "it holds 7+, which is too large", [None]),
        ("[%s, 2]" % ("7" * 5000), "it holds a number of 5000 digits", [None, 2]),
    ],
)
def test_odd_numbers_are_refused_or_mended(text, why, mended):
    """E1 of FAULTS."""
    with pytest.raises(UnfitError, match=why):
        read_strict(text)
    assert read_repaired(text) == mended


def test_nesting_has_a_bound():
    """E1 of FAULTS."""
    most = "[" * MAX_NESTING + "]" * MAX_NESTING
    assert encode(read_strict(most)) == most.encode()
    for text in (f"[{most}]", "[" * 100_000):
        with pytest.raises(UnfitError, match="more than 200 levels deep"):
            read_repaired(text)


@pytest.mark.parametrize("value", [math.nan, "\ud83d", {"\ud83d": 1}, {1, 2}])
def test_what_json_cannot_carry_is_not_encoded(value):
    with pytest.raises(UnfitError):
        encode(value)


def test_quotes_without_end_take_no_longer_than_text():
    """A string that is never closed is one token; to try it from each of its quotes would take hours."""
    assert not is_deeper('"' + '\\"' * 500_000 + "[" * 500, 300)
