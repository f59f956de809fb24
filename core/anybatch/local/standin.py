"""The stand-in model: deterministic answers in OpenAI's shapes, marked as such in `model`."""

import base64
import hashlib
import json
import math
import struct
from collections.abc import Callable
from typing import Any

from .faults import PREFIX, draw
from .schema import conform, first_words

Body = dict[str, Any]
DEFAULT_DIMENSIONS = 64
MAX_COUNT = 1 << 53
MAX_NUMBERS = 1 << 23  # in all vectors of one row: the process that retrieves the batch has to hold them
ERRORS = (  # the answers of rows that fail as planned; the row's id decides which
    (
        400,
        "invalid_request_error",
        "context_length_exceeded",
        "This model's maximum context length is exceeded.",
    ),
    (429, "rate_limit_error", "rate_limit_exceeded", "Rate limit reached for this stand-in model."),
    (500, "server_error", "server_error", "The server had an error while processing your request."),
)


def answer(endpoint: str, body: Body, *, identity: str, created: int) -> Body:
    """Return the stand-in's answer to a request that `check` accepts; its ids are made from `identity`."""
    return _ENDPOINTS[endpoint][1](body, identity, created) | {"model": label(body["model"])}


def label(model: str) -> str:
    """Return the name under which the stand-in answers for `model`, without parameters."""
    name = model.partition("?")[0] if model.startswith(PREFIX) else model
    return f"{name} (stand-in)"


def check(endpoint: str, body: Body) -> tuple[str, str] | None:
    """Return (parameter, message) if the body is invalid, so that its row fails with status 400."""
    if body.get("stream"):
        return "stream", "Streaming is not supported in batches."
    name = _ENDPOINTS[endpoint][0]
    value = body.get(name)
    if name == "messages":
        good = (
            isinstance(value, list)
            and value
            and all(isinstance(item, dict) and "role" in item for item in value)
        )
        return None if good else (name, "'messages' must be a non-empty list of objects with a 'role'.")
    good = isinstance(value, str | list) and bool(value)
    return None if good else (name, f"Missing required parameter: '{name}'.")


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> Body:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unsendable(reason: str) -> tuple[int, Body]:
    """Return the HTTP status and body of a row whose request cannot be sent to any provider."""
    message = f"This request cannot be sent: {reason}."
    return 400, error_body(message, "invalid_request_error", "unsendable_request")


def failure(custom_id: str) -> tuple[int, Body]:
    """Return the HTTP error of a row that fails as planned."""
    status, kind, code, message = ERRORS[int(draw("failure", custom_id) * len(ERRORS))]
    return status, error_body(message, kind, code)


def usage_of(body: Body) -> tuple[int, int]:
    """Return the (input, output) tokens of an answer of any endpoint."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return 0, 0
    read = usage.get("input_tokens", usage.get("prompt_tokens"))
    written = usage.get("output_tokens", usage.get("completion_tokens"))
    return _count(read), _count(written)


def _count(value: Any) -> int:
    """Return a plausible number of tokens, or 0: otherwise a batch's sum could exceed what JSON can carry."""
    return value if isinstance(value, int) and 0 <= value <= MAX_COUNT else 0


def supported(endpoint: str) -> bool:
    return endpoint in _ENDPOINTS


def _tokens(text: str) -> int:
    return math.ceil(len(text) / 4)


def _text(content: Any) -> str:
    """Return the text of a message's content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(
            _text(part.get("text", "")) if isinstance(part, dict) else _text(part) for part in content
        )
    return "" if content is None else str(content)


def _prompt(messages: Any) -> tuple[str, int]:
    """Return the text of the last user message, and the estimated tokens of all messages."""
    if isinstance(messages, str):
        return messages, _tokens(messages)
    texts = [(item.get("role"), _text(item.get("content"))) for item in messages if isinstance(item, dict)]
    last = next((text for role, text in reversed(texts) if role == "user"), texts[-1][1] if texts else "")
    return last, sum(_tokens(text) for _, text in texts)


def _say(prompt: str, format_: Any) -> str:
    """Return the answer's text: JSON in the requested shape, or the prompt's first words and its hash."""
    digest = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=3).hexdigest()
    words = first_words(prompt, 12)
    kind = format_.get("type") if isinstance(format_, dict) else None
    if kind == "json_schema":
        schema = format_.get("json_schema", format_).get("schema", {})
        return json.dumps(conform(schema, prompt), ensure_ascii=False, allow_nan=False)
    if kind == "json_object":
        return json.dumps({"echo": words, "digest": digest}, ensure_ascii=False)
    return f"{words} [{digest}]"


def _tool_call(body: Body, prompt: str, identity: str) -> Body | None:
    """Return a call of the tool that the request forces; None if it forces none."""
    choice = body.get("tool_choice")
    tools = [tool["function"] for tool in body.get("tools") or [] if isinstance(tool.get("function"), dict)]
    if isinstance(choice, dict):
        wanted = choice.get("function", {}).get("name")
        tools = [tool for tool in tools if tool.get("name") == wanted]
    elif choice != "required":
        return None
    if not tools:
        return None
    arguments = json.dumps(
        conform(tools[0].get("parameters", {"type": "object"}), prompt), ensure_ascii=False, allow_nan=False
    )
    call = {"name": tools[0].get("name"), "arguments": arguments}
    return {"id": f"call_{identity}", "type": "function", "function": call}


def _chat(body: Body, identity: str, created: int) -> Body:
    prompt, read = _prompt(body["messages"])
    call = _tool_call(body, prompt, identity)
    content = None if call else _say(prompt, body.get("response_format"))
    message: Body = {"role": "assistant", "content": content, "refusal": None}
    if call:
        message["tool_calls"] = [call]
    written = _tokens(content or json.dumps(call))
    reason = "tool_calls" if call else "stop"
    return {
        "id": f"chatcmpl-{identity}",
        "object": "chat.completion",
        "created": created,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def _responses(body: Body, identity: str, created: int) -> Body:
    prompt, read = _prompt(body["input"])
    read += _tokens(_text(body.get("instructions")))
    format_ = body["text"].get("format") if isinstance(body.get("text"), dict) else None
    content = _say(prompt, format_)
    written = _tokens(content)
    usage = token_usage(read, written)
    usage["input_tokens_details"]["cache_write_tokens"] = 0
    message = {
        "type": "message",
        "id": f"msg_{identity}",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": content, "annotations": []}],
    }
    return {
        "id": f"resp_{identity}",
        "object": "response",
        "created_at": created,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "output": [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage,
    }


def token_usage(read: int, written: int) -> Body:
    """Return token counts in the format of the Responses API and of finished batches."""
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }


def _completion(body: Body, identity: str, created: int) -> Body:
    prompts = _several(body["prompt"])
    said = [_say(prompt, None) for prompt in prompts]
    read, written = sum(map(_tokens, prompts)), sum(map(_tokens, said))
    return {
        "id": f"cmpl-{identity}",
        "object": "text_completion",
        "created": created,
        "choices": [
            {"index": i, "text": text, "logprobs": None, "finish_reason": "stop"}
            for i, text in enumerate(said)
        ],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def _embeddings(body: Body, identity: str, created: int) -> Body:
    texts = _several(body["input"])
    size = body.get("dimensions")
    size = size if isinstance(size, int) and size > 0 else DEFAULT_DIMENSIONS
    if size * len(texts) > MAX_NUMBERS:
        raise ValueError(f"{len(texts)} vectors of {size} numbers are more than the stand-in makes")
    packed = body.get("encoding_format") == "base64"
    read = sum(map(_tokens, texts))
    data = []
    for index, text in enumerate(texts):
        vector = unit_vector(text, size)
        value = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode() if packed else vector
        data.append({"object": "embedding", "index": index, "embedding": value})
    return {"object": "list", "data": data, "usage": {"prompt_tokens": read, "total_tokens": read}}


_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)


def _moderations(body: Body, identity: str, created: int) -> Body:
    result = {
        "flagged": False,
        "categories": dict.fromkeys(_CATEGORIES, False),
        "category_scores": dict.fromkeys(_CATEGORIES, 0.0),
        "category_applied_input_types": {name: ["text"] for name in _CATEGORIES},
    }
    texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
    return {"id": f"modr-{identity}", "results": [result for _ in texts]}


def _several(value: Any) -> list[str]:
    """Return the texts of an input that is one text, several, or token numbers."""
    if isinstance(value, str):
        return [value]
    if all(isinstance(item, int) for item in value):
        return [" ".join(map(str, value))]
    return [item if isinstance(item, str) else " ".join(map(str, item)) for item in value]


def unit_vector(text: str, size: int) -> list[float]:
    """Return a vector of length 1 whose direction depends only on the text."""
    raw = hashlib.shake_128(text.encode("utf-8", "surrogatepass")).digest(2 * size)
    centred = [number - 32767.5 for number in struct.unpack(f"<{size}H", raw)]
    length = math.sqrt(sum(number * number for number in centred))
    return [round(number / length, 8) for number in centred]


_ENDPOINTS: dict[str, tuple[str, Callable[[Body, str, int], Body]]] = {
    "/v1/chat/completions": ("messages", _chat),
    "/v1/responses": ("input", _responses),
    "/v1/completions": ("prompt", _completion),
    "/v1/embeddings": ("input", _embeddings),
    "/v1/moderations": ("input", _moderations),
}
ENDPOINTS = tuple(_ENDPOINTS)
