"""Make a document that conforms to a JSON schema from a prompt; the same prompt makes the same document."""

import math
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from .faults import draw

Json = Any
MAX_DEPTH = 12  # the depth at which a schema that refers to itself is ended, if it allows an end
MAX_STEPS = 100_000  # a schema of a few lines can ask for more values than there is memory or time for
MAX_TEXT = 1_000_000  # characters
_FORMATS = {
    "date-time": "2024-01-31T12:00:00Z",
    "date": "2024-01-31",
    "time": "12:00:00Z",
    "duration": "P1D",
    "email": "someone@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "uri": "https://example.com/",
}


def conform(schema: Json, prompt: str) -> Json:
    """Answer `prompt` in the shape of `schema`.

    Objects get all their properties, arrays as few items as allowed (but one if possible), `anyOf` its first
    choice, strings the prompt's words; enums and numbers are chosen by the prompt's hash. `pattern` and `not`
    are ignored. Raises ValueError if the document would be larger than a model's answer can be.
    """
    return _Maker(schema, prompt).value(schema, "$", 0)


@dataclass(frozen=True)
class _Maker:
    root: Json
    prompt: str
    steps: "count[int]" = field(default_factory=count)

    def value(self, schema: Json, path: str, depth: int) -> Json:
        schema = self.resolve(schema)
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return schema["enum"][int(draw(self.prompt, path) * len(schema["enum"]))]
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                return self.value(self.choose(schema[key], depth), path, depth + 1)
        kind = schema.get("type") or (
            "object" if "properties" in schema else "array" if "items" in schema else "string"
        )
        if isinstance(kind, list):
            kind = "null" if depth > MAX_DEPTH and "null" in kind else kind[0]
        match kind:
            case "object":
                return self.object(schema, path, depth)
            case "array":
                return self.array(schema, path, depth)
            case "integer" | "number":
                return self.number(schema, path, kind)
            case "boolean":
                return draw(self.prompt, path) < 0.5
            case "null":
                return None
        return self.string(schema)

    def resolve(self, schema: Json) -> dict[str, Json]:
        """Follow `$ref` within the document and merge `allOf` into one schema."""
        if next(self.steps) > MAX_STEPS:
            raise ValueError(f"its schema takes more than {MAX_STEPS} steps to answer")
        hops = 0
        while isinstance(schema, dict) and "$ref" in schema and hops < 100:
            hops += 1
            target: Json = self.root
            for key in str(schema["$ref"]).removeprefix("#").split("/")[1:]:
                key = key.replace("~1", "/").replace("~0", "~")
                target = target[key] if isinstance(target, dict) and key in target else {}
            schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
        if not isinstance(schema, dict):
            return {}
        if isinstance(schema.get("allOf"), list):
            merged: dict[str, Json] = {}
            for part in [
                *map(self.resolve, schema["allOf"]),
                {k: v for k, v in schema.items() if k != "allOf"},
            ]:
                properties = {**merged.get("properties", {}), **part.get("properties", {})}
                merged |= part | ({"properties": properties} if properties else {})
            return merged
        return schema

    def choose(self, choices: list[Json], depth: int) -> Json:
        if depth > MAX_DEPTH:  # prefer the smallest choice, which is least likely to recurse
            return min(choices, key=lambda choice: len(str(self.resolve(choice))))
        return choices[0]

    def object(self, schema: dict[str, Json], path: str, depth: int) -> dict[str, Json]:
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        names = [name for name in properties if depth <= MAX_DEPTH or name in required]
        if depth > 4 * MAX_DEPTH:  # no finite document conforms to this schema
            names = []
        return {name: self.value(properties[name], f"{path}.{name}", depth + 1) for name in names}

    def array(self, schema: dict[str, Json], path: str, depth: int) -> list[Json]:
        prefix = schema.get("prefixItems") or []
        wanted = max(
            len(prefix), schema.get("minItems", 0) if depth > MAX_DEPTH else schema.get("minItems", 1)
        )
        wanted = min(wanted, schema.get("maxItems", wanted))
        return [
            self.value(prefix[i] if i < len(prefix) else schema.get("items", {}), f"{path}[{i}]", depth + 1)
            for i in range(wanted)
        ]

    def number(self, schema: dict[str, Json], path: str, kind: str) -> float:
        low = schema.get("minimum")
        if low is None and schema.get("exclusiveMinimum") is not None:
            low = schema["exclusiveMinimum"] + (1 if kind == "integer" else 1e-6)
        high = schema.get("maximum")
        if high is None and schema.get("exclusiveMaximum") is not None:
            high = schema["exclusiveMaximum"] - (1 if kind == "integer" else 1e-6)
        low = (min(0, high) if high is not None else 0) if low is None else low
        high = max(low, 100) if high is None else high
        step = schema.get("multipleOf") or (1 if kind == "integer" else 0)
        value = low + draw(self.prompt, path) * (high - low)
        if step:
            value = min(max(round(value / step), math.ceil(low / step)), math.floor(high / step)) * step
        return (
            int(value) if kind == "integer" else round(value, 4) if high - low > 0.01 and not step else value
        )

    def string(self, schema: dict[str, Json]) -> str:
        if schema.get("format") in _FORMATS:
            return _FORMATS[schema["format"]]
        text = first_words(self.prompt, 8) or "nothing"
        least = schema.get("minLength", 0)
        if least > MAX_TEXT:
            raise ValueError(f"its schema asks for a text of more than {MAX_TEXT} characters")
        while len(text) < least:
            text += " " + text
        return text[: max(least, schema.get("maxLength", len(text)))] if "maxLength" in schema else text


def first_words(text: str, count: int) -> str:
    """Return the first words of a text, separated by blanks."""
    return " ".join(text.split(None, count)[:count])
