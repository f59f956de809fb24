"""Rows of a fake batch: what the stand-in model answers, and how the result lines are spoilt on request."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

Json = dict[str, Any]


class Fate(StrEnum):
    """What becomes of one row."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Failure:
    """How a failed row failed."""

    status: int = 400
    code: str = "context_length_exceeded"
    message: str = "This model's maximum context length is 8 tokens."
    kind: str = "invalid_request_error"


@dataclass(frozen=True)
class Quirks:
    """What real servers have been seen to do to results; members naming ids apply to those rows only.

    `files`: where lines go. "natural" has a file only for lines there are, "both" also an empty one, "output"
    and "error" put all lines into that one file, "neither" loses them (the counts stay).
    `files_after_looks`: the batch says completed, with counts, that many looks before it names its files.
    """

    shuffled: bool = False
    files: Literal["natural", "both", "output", "error", "neither"] = "natural"
    files_after_looks: int = 0
    missing: Collection[str] = ()
    extra: Sequence[str] = ()
    duplicated: Collection[str] = ()
    separators: Collection[str] = ()  # U+2028, U+2029 and U+0085 stand raw inside a string
    bad_utf8: Collection[str] = ()
    bad_json: Collection[str] = ()
    body_as_text: bool = False  # response.body is a string of JSON
    error_as_text: bool = False  # error is a string
    blank_lines: bool = False
    crlf: bool = False
    unterminated: bool = False  # the last line has no line end


@dataclass
class Line:
    """One result line; `failed` says which file it belongs to."""

    custom_id: str
    value: Json
    failed: bool


SEPARATORS = "\u2028\u2029\u0085"
_MARK = "\ue000"  # stands for the bad byte until the line is bytes


def write_lines(lines: Iterable[Line], quirks: Quirks) -> tuple[bytes | None, bytes | None]:
    """The bytes of the output and of the error file; None where there is to be no such file."""
    kept = [line for line in lines if line.custom_id not in quirks.missing]
    for custom_id in quirks.extra:
        value = {**(kept[0].value if kept else {}), "custom_id": custom_id}
        kept.append(Line(custom_id, value, failed=False))
    kept += [
        Line(line.custom_id, _spoilt(line.value, " (again)"), line.failed)
        for line in kept
        if line.custom_id in quirks.duplicated
    ]
    if quirks.shuffled:
        kept = _shuffled(kept)
    good, bad = [line for line in kept if not line.failed], [line for line in kept if line.failed]
    match quirks.files:
        case "natural":
            return (_join(good, quirks) if good else None), (_join(bad, quirks) if bad else None)
        case "both":
            return _join(good, quirks), _join(bad, quirks)
        case "output":
            return _join(kept, quirks), None
        case "error":
            return None, _join(kept, quirks)
        case "neither":
            return None, None


def _join(lines: Sequence[Line], quirks: Quirks) -> bytes:
    end = b"\r\n" if quirks.crlf else b"\n"
    text = (end + end if quirks.blank_lines else end).join(_encode(line, quirks) for line in lines)
    return text if quirks.unterminated or not lines else text + end


def _shuffled(lines: Sequence[Line]) -> list[Line]:
    """Another order, the same one every time, and really another wherever there can be one."""
    mixed = random.Random(20).sample(lines, len(lines))
    return mixed if mixed != list(lines) else mixed[::-1]


def _encode(line: Line, quirks: Quirks) -> bytes:
    value = line.value
    if line.custom_id in quirks.separators:
        value = _spoilt(value, SEPARATORS)
    if line.custom_id in quirks.bad_utf8:
        value = _spoilt(value, _MARK)
    if quirks.body_as_text and isinstance(value.get("response"), dict) and "body" in value["response"]:
        text = json.dumps(value["response"]["body"], ensure_ascii=False)
        value = {**value, "response": {**value["response"], "body": text}}
    if quirks.error_as_text and isinstance(value.get("error"), dict):
        value = {**value, "error": value["error"].get("message", "failed")}
    text = json.dumps(value, ensure_ascii=False)
    if line.custom_id in quirks.bad_json:
        text = text[: len(text) * 2 // 3]
    return text.encode().replace(_MARK.encode(), b"\xff")


def _spoilt(value: Json, mark: str) -> Json:
    """A copy with `mark` at the end of the first text a model or a server wrote."""
    copy: Json = json.loads(json.dumps(value))
    if not _append(copy, mark):
        copy["note"] = mark
    return copy


def _append(value: Any, mark: str) -> bool:
    if isinstance(value, list):
        return any(_append(item, mark) for item in value)
    if not isinstance(value, dict):
        return False
    for name, item in value.items():
        if name in ("content", "text", "message") and isinstance(item, str):
            value[name] = item + mark
            return True
        if _append(item, mark):
            return True
    return False


def echo(endpoint: str, body: Json) -> Json:
    """The stand-in model: a well-formed OpenAI response body whose text repeats the request's last words."""
    model = str(body.get("model") or "echo")
    said = last_words(body)
    tokens, answer = len(said.split()), f"echo: {said}"
    if endpoint.endswith("/chat/completions"):
        message = {"role": "assistant", "content": answer, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        usage = {"prompt_tokens": tokens, "completion_tokens": tokens + 1, "total_tokens": 2 * tokens + 1}
        return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1_760_000_000, "model": model,
                "choices": [choice], "usage": usage}  # fmt: skip
    if endpoint.endswith("/responses"):
        text = {"type": "output_text", "text": answer, "annotations": []}
        output = {"id": "msg_1", "type": "message", "role": "assistant", "content": [text]}
        usage = {"input_tokens": tokens, "output_tokens": tokens + 1, "total_tokens": 2 * tokens + 1}
        return {"id": "resp_1", "object": "response", "created_at": 1_760_000_000, "status": "completed",
                "model": model, "output": [output], "usage": usage}  # fmt: skip
    if endpoint.endswith("/embeddings"):
        inputs = body.get("input") if isinstance(body.get("input"), list) else [said]
        data = [
            {"object": "embedding", "index": index, "embedding": [float(len(str(text))), 0.5]}
            for index, text in enumerate(inputs or [])
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": model, "usage": usage}
    choice = {"index": 0, "text": answer, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": tokens, "completion_tokens": tokens + 1, "total_tokens": 2 * tokens + 1}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1_760_000_000, "model": model,
            "choices": [choice], "usage": usage}  # fmt: skip


def last_words(body: Json) -> str:
    """The text a request ends with: of its last message, its input or its prompt."""
    for name in ("messages", "input", "prompt"):
        value = body.get(name)
        while isinstance(value, list | dict) and value:
            value = value[-1] if isinstance(value, list) else value.get("content", value.get("text"))
        if isinstance(value, str):
            return value
    return ""


def add_usage(usage: Json | None, more: Json) -> Json:
    """The batch's usage with one response's added, whichever of OpenAI's two spellings that has."""
    spent = usage or {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    read = more.get("input_tokens", more.get("prompt_tokens", 0))
    written = more.get("output_tokens", more.get("completion_tokens", 0))
    return {
        "input_tokens": spent["input_tokens"] + read,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": spent["output_tokens"] + written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": spent["total_tokens"] + read + written,
    }
