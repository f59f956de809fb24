"""Validate a batch's input after the create, as OpenAI does, and plan the outcome of each row."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from . import faults, standin
from .jsontext import UnfitError, read_repaired, read_strict, shallow
from .machine import Json, Record

MAX_PROBLEMS = 100


class Plan(NamedTuple):
    """The result of validation: the planned outcome of each row, or why the batch fails."""

    outcomes: bytes
    problems: list[Json]


class Line(NamedTuple):
    """A line of the input.

    Attributes:
        number: The line number, from 1.
        request: Its JSON value; None if it is not JSON.
        unfit: Why the row can be neither sent nor answered, although its custom_id can be read. Only that row
            fails then, and `request` leaves out what is nested in its body.
    """

    number: int
    request: Any
    unfit: str | None


def problem(code: str, message: str, param: str | None, line: int | None) -> Json:
    return {"code": code, "message": message, "param": param, "line": line}


def read_plan(lines: BinaryIO, batch: Record) -> Plan:
    """Check every line as OpenAI does after the create, and plan the outcome of each row."""
    outcomes = bytearray()
    problems: list[Json] = []
    seen: set[str] = set()
    try:
        ask = faults.parse(batch.model, batch.endpoint) if not batch.upstream else faults.Faults()
    except faults.ModelError as error:
        ask = faults.Faults()
        problems.append(problem("model_not_found", str(error), "body.model", 1))
    # A row that a job submits again gets a new planned outcome, as it might at a real provider.
    again = str(json.loads(batch.metadata or "{}").get("anybatch_round", "1"))
    answerable = batch.upstream or standin.supported(batch.endpoint)
    if not answerable:  # a server with an upstream accepts any endpoint, since it does not know the model yet
        message = f"The stand-in model does not answer {batch.endpoint}."
        problems.append(problem("invalid_endpoint", message, "endpoint", None))
    for number, request, unfit in read_lines(lines):
        if len(problems) >= MAX_PROBLEMS:
            break
        if found := _line_problem(request, batch.endpoint, batch.model, seen):
            problems.append(found | {"line": number})
        elif answerable:
            fits = not unfit and (batch.upstream or standin.check(batch.endpoint, request["body"]) is None)
            outcomes.append(ask.fate(request["custom_id"], again) if fits else faults.FAIL)
    if not outcomes and not problems:
        message = "The input file is empty. Please ensure that the batch contains at least one request."
        problems.append(problem("empty_file", message, "input_file_id", None))
    if ask.invalid and not problems:
        problems.append(
            problem(
                ask.invalid, f"Validation failed with '{ask.invalid}', as the model requests.", None, None
            )
        )
    return Plan(bytes(outcomes), problems)


def read_lines(lines: BinaryIO) -> Iterator[Line]:
    """Yield each line that is not blank, numbered from 1."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Line(number, *read_request(line))


def read_request(line: bytes) -> tuple[Any, str | None]:
    """Return the JSON value of one line and why it is unfit, for `Line`."""
    try:
        text = line.decode()  # not `json.loads(line)`: bytes may also be UTF-16 or begin with a BOM
        try:
            return read_strict(text), None
        except UnfitError as error:
            return read_repaired(shallow(text, 2)), str(error)  # the line's own members and the body's
    except ValueError:
        return None, None


def _line_problem(request: Any, endpoint: str, model: str | None, seen: set[str]) -> Json | None:
    if not isinstance(request, dict):
        return problem("invalid_json_line", "This line is not parseable as a JSON object.", None, None)
    custom_id, body = request.get("custom_id"), request.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return problem(
            "missing_required_parameter", "Each line needs a 'custom_id' string.", "custom_id", None
        )
    if custom_id in seen:
        message = f"The custom_id '{custom_id}' is used more than once; it must be unique within a batch."
        return problem("duplicate_custom_id", message, "custom_id", None)
    seen.add(custom_id)
    if request.get("method") != "POST":
        return problem("invalid_method", "The method of each line must be POST.", "method", None)
    if request.get("url") != endpoint:
        message = f"The url '{request.get('url')}' does not match the batch's endpoint '{endpoint}'."
        return problem("url_mismatch", message, "url", None)
    if not isinstance(body, dict):
        return problem("missing_required_parameter", "Each line needs a 'body' object.", "body", None)
    if not isinstance(body.get("model"), str) or not body["model"]:
        return problem("missing_required_parameter", "Each body needs a 'model'.", "body.model", None)
    if model is not None and body["model"] != model:
        message = (
            f"The model '{body['model']}' does not match '{model}' of line 1; a batch is for a single model."
        )
        return problem("model_mismatch", message, "body.model", None)
    return None
