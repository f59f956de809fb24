"""Captured requests and responses held against the providers' own OpenAPI documents.

    spec = load_spec("openai")                       # skips the test where the documents are not at hand
    assert spec.problems(server.calls) == []

A problem is one sentence. In answers, optional members that are null although the document does not allow it
count as absent: that is how the real servers write them.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import best_match

from .forms import FormError, parse_form

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from .server import Call, Reply, Request

Json = dict[str, Any]
METHODS = ("get", "put", "post", "delete", "patch")


def find_specs() -> Path | None:
    """The folder of OpenAPI documents: $ANYBATCH_SPECS, or `../shared/specs` beside the repository."""
    named = os.environ.get("ANYBATCH_SPECS")
    folder = Path(named) if named else Path(__file__).resolve().parents[2].parent / "shared" / "specs"
    return folder if folder.is_dir() else None


def load_spec(name: str) -> Spec:
    """The document of a provider; skips the calling test if there is none."""
    folder = find_specs()
    if folder is None or not (folder / f"{name}.json").is_file():
        pytest.skip(f"no OpenAPI document of {name}")
    return _load(folder / f"{name}.json")


@functools.cache
def _load(path: Path) -> Spec:
    return Spec(json.loads(path.read_text()))


class Spec:
    """One OpenAPI document, 3.0 or 3.1."""

    def __init__(self, document: Json) -> None:
        self._document = _modernised(document) if document["openapi"].startswith("3.0") else document
        self._prefix = urlsplit(document["servers"][0]["url"]).path.rstrip("/")
        self._operations = [
            (method.upper(), _path_pattern(path), item[method], item.get("parameters", []))
            for path, item in self._document["paths"].items()
            for method in METHODS
            if method in item
        ]
        self._validators: dict[int, Draft202012Validator] = {}

    def problems(self, calls: Iterable[Call], *, extra_query: Collection[str] = ()) -> list[str]:
        """All that is wrong with these requests and their answers; `extra_query` names are let through."""
        found: list[str] = []
        for call in calls:
            found += self.request_problems(call.request, extra_query=extra_query)
            if call.reply is not None:
                found += self.reply_problems(call.request, call.reply)
        return found

    def request_problems(self, request: Request, *, extra_query: Collection[str] = ()) -> list[str]:
        """What is wrong with path, query, headers and body of a request."""
        found = self._find(request)
        if found is None:
            return [f"{request.method} {request.path}: no such operation"]
        operation, parameters, in_path = found
        problems = [
            *self._parameter_problems(parameters, "path", {name: [text] for name, text in in_path.items()}),
            *self._query_problems(parameters, request, extra_query),
            *self._parameter_problems(parameters, "header", _single(request.headers)),
            *self._body_problems(operation, request),
        ]
        return [f"{request.method} {request.path}: {problem}" for problem in problems]

    def reply_problems(self, request: Request, reply: Reply) -> list[str]:
        """What is wrong with an answer; only JSON and JSON lines are looked into."""
        found = self._find(request)
        if found is None:
            return [f"{request.method} {request.path}: no such operation"]
        responses = found[0]["responses"]
        described = responses.get(str(reply.status)) or responses.get(f"{reply.status // 100}XX")
        place = f"{request.method} {request.path} -> {reply.status}"
        if described is None:
            return [f"{place}: not described"] if reply.status < 400 else []
        kind = reply.headers.get("content-type", "")
        schema = described.get("content", {}).get(kind, {}).get("schema")
        if schema is None or not (kind == "application/json" or kind.endswith("jsonl")):
            return []
        texts = [reply.body] if kind == "application/json" else reply.body.splitlines()
        return [
            f"{place}: {problem}"
            for text in texts
            for problem in self._check(schema, json.loads(text), nulls=True)
        ]

    def schema_problems(self, name: str, value: Any) -> list[str]:
        """What is wrong with a value that should be one of the document's named schemas."""
        return self._check(self._document["components"]["schemas"][name], value, nulls=True)

    def _find(self, request: Request) -> tuple[Json, list[Json], dict[str, str]] | None:
        path = request.path
        if not path.startswith(self._prefix):
            return None
        for method, pattern, operation, shared in self._operations:
            match = pattern.fullmatch(path.removeprefix(self._prefix))
            if match is not None and method == request.method:
                names = {name: unquote(text) for name, text in match.groupdict().items()}
                return operation, [*shared, *operation.get("parameters", [])], names
        return None

    def _query_problems(
        self, parameters: list[Json], request: Request, extra: Collection[str]
    ) -> Iterator[str]:
        described = {one["name"]: one["schema"] for one in parameters if one["in"] == "query"}
        # an object parameter is sent as bare keys (style form, exploded), so that any name may be one of them
        open_ended = any("object" in _types(schema) for schema in described.values())
        for name in request.query:
            if name not in described and name not in extra and not open_ended:
                yield f"query parameter {name!r} is not described"
        yield from self._parameter_problems(parameters, "query", request.query)

    def _parameter_problems(
        self, parameters: list[Json], place: str, given: Mapping[str, list[str]]
    ) -> Iterator[str]:
        for parameter in parameters:
            if parameter["in"] != place:
                continue
            texts = given.get(parameter["name"].lower() if place == "header" else parameter["name"])
            if texts is None:
                if parameter.get("required"):
                    yield f"{place} parameter {parameter['name']!r} is missing"
                continue
            value = _from_text(parameter["schema"], texts)
            for problem in self._check(parameter["schema"], value):
                yield f"{place} parameter {parameter['name']!r}: {problem}"

    def _body_problems(self, operation: Json, request: Request) -> Iterator[str]:
        described = operation.get("requestBody")
        if described is None:
            if request.body not in (b"", b"{}"):
                yield "there should be no body"
            return
        kind = request.headers.get("content-type", "").split(";")[0]
        if kind not in described["content"]:
            yield f"content type {kind!r} is not described"
            return
        schema = described["content"][kind]["schema"]
        try:
            value = (
                _form_value(request, schema) if kind.startswith("multipart/") else json.loads(request.body)
            )
        except (FormError, ValueError) as error:
            yield f"the body cannot be read: {error}"
            return
        yield from self._check(schema, value)

    def _check(self, schema: Json, value: Any, *, nulls: bool = False) -> list[str]:
        """What is wrong with a value; with `nulls`, optional members may be null."""
        if nulls:
            value = self._without_nulls(schema, value)
        errors = [best_match([error]) for error in self._validator(schema).iter_errors(value)]
        return [
            f"{'.'.join(map(str, error.absolute_path)) or 'value'}: {error.message[:300]}" for error in errors
        ]

    def _validator(self, schema: Json) -> Draft202012Validator:
        validator = self._validators.get(id(schema))
        if validator is None:
            whole = {"allOf": [schema], "components": self._document["components"]}
            validator = Draft202012Validator(whole, format_checker=FormatChecker())
            self._validators[id(schema)] = validator
        return validator

    def _without_nulls(self, schema: Json, value: Any) -> Any:
        """A copy without the optional members that are null where the schema knows no null."""
        schema = self._resolved(schema)
        if isinstance(value, list):
            return [self._without_nulls(schema.get("items", {}), item) for item in value]
        if not isinstance(value, dict):
            return value
        properties, required = schema.get("properties", {}), schema.get("required", [])
        return {
            name: self._without_nulls(properties.get(name, {}), item)
            for name, item in value.items()
            if item is not None
            or name in required
            or name not in properties
            or self._validator(properties[name]).is_valid(None)
        }

    def _resolved(self, schema: Json) -> Json:
        while "$ref" in schema:
            schema = self._document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
        return schema


def _modernised(value: Any) -> Any:
    """An OpenAPI 3.0 schema in the words of 3.1: `nullable` becomes the type null."""
    if isinstance(value, list):
        return [_modernised(item) for item in value]
    if not isinstance(value, dict):
        return value
    schema = {name: _modernised(item) for name, item in value.items()}
    if schema.pop("nullable", None) is True:
        return {"anyOf": [schema, {"type": "null"}]}
    return schema


def _path_pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))


def _single(headers: Mapping[str, str]) -> dict[str, list[str]]:
    return {name: [text] for name, text in headers.items()}


def _types(schema: Json) -> set[str]:
    """The JSON types a simple schema names."""
    types = schema.get("type", [])
    found = {types} if isinstance(types, str) else set(types)
    return found.union(*(_types(one) for one in schema.get("anyOf", [])))


def _from_text(schema: Json, texts: list[str]) -> Any:
    """The JSON value that a parameter's or form field's text stands for."""
    types = _types(schema)
    if "array" in types:
        return texts
    convert: list[tuple[str, Callable[[str], Any]]] = [
        ("integer", int),
        ("number", float),
        ("boolean", {"true": True, "false": False}.__getitem__),
    ]
    for name, read in convert:
        if name in types:
            try:
                return read(texts[0])
            except (ValueError, KeyError):
                return texts[0]  # the schema will say what is wrong with it
    return texts[0]


def _form_value(request: Request, schema: Json) -> Json:
    """A form as the object its schema describes; `a[b]` and `a.b` are members of `a`."""
    value: Json = {}
    for name, part in parse_form(request.headers["content-type"], request.body).items():
        outer, _, inner = name.replace("]", "").replace(".", "[").partition("[")
        text = part.data.decode("utf-8", "replace")
        if inner:
            value.setdefault(outer, {})[inner] = int(text) if text.isdecimal() else text
        else:
            value[name] = _from_text(schema.get("properties", {}).get(name, {}), [text])
    return value
