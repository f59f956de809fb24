"""Translate OpenAI chat completions to Anthropic Messages, and back.

Pure functions over JSON values: no I/O, no state. A parameter that Messages cannot express raises
`Untranslatable`, which names it, or is left out if the caller says so (`drop`). Values that make no
difference (`n=1`, `stream=false`, penalties of 0, null) are skipped. Nothing else is ignored.

Sources: Anthropic API reference "Create a Message" (schemas `CreateMessageParams`, `Message`) and "OpenAI SDK
compatibility"; OpenAI API reference "Create chat completion".
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

from .turns import Malformed, Turns, Untranslatable, digest, is_list

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Untranslatable", "error_status", "from_message", "original_id", "safe_id", "to_messages"]

_SAFE_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_PREFIX = "ab_"
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_TIERS = {"auto": "auto", "default": "standard_only"}
_CHOICES = {"auto": "auto", "none": "none", "required": "any"}

# Parameters without a counterpart. For each: the value, besides null, that asks for what Messages does anyway
# (null if there is none), and advice ("" if there is none).
_FOREIGN: dict[str, tuple[Any, str]] = {
    "audio": (None, "Messages answers in text only"),
    "frequency_penalty": (0, ""),
    "function_call": (None, "write it as tool_choice"),
    "functions": ([], "write them as tools"),
    "logit_bias": ({}, ""),
    "logprobs": (False, ""),
    "metadata": ({}, "Messages keeps no labels; its metadata.user_id comes from `user`"),
    "modalities": (["text"], "Messages answers in text only"),
    "n": (1, "Messages gives one answer per request"),
    "presence_penalty": (0, ""),
    "store": (False, ""),
    "stream": (False, "a batch does not stream"),
    "top_logprobs": (0, ""),
    "verbosity": ("medium", ""),
}
_HINTS = (
    "moderation prediction prompt_cache_key prompt_cache_options prompt_cache_retention seed stream_options"
)
_FOREIGN |= dict.fromkeys([*_HINTS.split(), "web_search_options"], (None, ""))
_NATIVE = "cache_control container inference_geo output_config stop_sequences system thinking top_k"
_FOREIGN |= dict.fromkeys(_NATIVE.split(), (None, "is Anthropic's own: send a Messages body to /v1/messages"))

_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_ERROR_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


def to_messages(
    body: Mapping[str, Any], *, drop: bool = False, default_max_tokens: int = 4096
) -> dict[str, Any]:
    """Translate a chat completions body to the parameters of `POST /v1/messages`.

    System and developer messages become `system`, joined by newlines wherever they were, as in Anthropic's
    own compatibility layer. Messages requires `max_tokens`: if the body sets no limit, it is
    `default_max_tokens`. Raises Untranslatable for parameters without a counterpart, unless `drop` leaves
    them out, and Malformed for broken ones.
    """
    return _Translation(body, drop=drop, default_max_tokens=default_max_tokens).run()


class _Translation:
    """The translation of one body; `params` is the result so far."""

    def __init__(self, body: Mapping[str, Any], *, drop: bool, default_max_tokens: int) -> None:
        self.body = {name: value for name, value in body.items() if value is not None}
        self.drop = drop
        self.params: dict[str, Any] = {"max_tokens": default_max_tokens}

    def run(self) -> dict[str, Any]:
        for required in ("model", "messages"):
            if required not in self.body:
                raise Malformed(required, "is required")
        for name, value in self.body.items():
            if name in _TRANSLATORS:
                _TRANSLATORS[name](self, value)
                continue
            neutral, advice = _FOREIGN.get(name, (None, "is not a parameter of chat completions"))
            if value != neutral:
                self.refuse(name, advice or "has no counterpart in Messages")
        self.tool_choice()
        return self.params

    def refuse(self, parameter: str, reason: str) -> None:
        if not self.drop:
            raise Untranslatable(parameter, reason)

    def model(self, model: Any) -> None:
        if not isinstance(model, str):
            raise Malformed("model", "must be a string")
        self.params["model"] = model

    def messages(self, messages: Any) -> None:
        if not is_list(messages):
            raise Malformed("messages", "must be a list")
        conversation = Turns(self.refuse)
        for index, message in enumerate(messages):
            conversation.add(message, f"messages[{index}]")
        if not conversation.turns:
            raise Malformed("messages", "Messages needs at least one user message that is not empty")
        self.params["messages"] = conversation.turns
        if conversation.system:
            self.params["system"] = "\n".join(conversation.system)

    def max_tokens(self, _: Any) -> None:
        """`max_completion_tokens` is the newer of the two names, and wins."""
        limits = [self.body[name] for name in ("max_completion_tokens", "max_tokens") if name in self.body]
        if limits[0] != limits[-1]:
            self.refuse("max_tokens", "contradicts max_completion_tokens")
        if not isinstance(limits[0], int) or limits[0] < 1:
            raise Malformed("max_tokens", "must be a whole number above 0")
        self.params["max_tokens"] = limits[0]

    def temperature(self, value: Any) -> None:
        self.sampling("temperature", value)

    def top_p(self, value: Any) -> None:
        self.sampling("top_p", value)

    def sampling(self, name: str, value: Any) -> None:
        if not isinstance(value, int | float) or value < 0:
            raise Malformed(name, "must be a number from 0 up")
        if value > 1:
            self.refuse(name, f"{value} is above 1, the highest that Messages takes")
        elif value != 1:
            # 1 is the default of both APIs; leave it out, since newer Claude models refuse the parameter.
            self.params[name] = value

    def stop(self, stop: Any) -> None:
        stops = [stop] if isinstance(stop, str) else stop
        if not is_list(stops) or not all(isinstance(item, str) for item in stops):
            raise Malformed("stop", "must be a string or a list of strings")
        kept = [item for item in stops if item.strip()]
        if len(kept) < len(stops):
            self.refuse("stop", "Messages takes no stop sequence of white space only")
        if kept:
            self.params["stop_sequences"] = kept

    def end_user(self, _: Any) -> None:
        """`safety_identifier` has replaced `user` in OpenAI's API, and wins."""
        name = next(name for name in ("safety_identifier", "user") if name in self.body)
        user_id = self.body[name]
        if not isinstance(user_id, str):
            raise Malformed(name, "must be a string")
        if self.body.get("user", user_id) != user_id:
            self.refuse("user", "contradicts safety_identifier, and Messages has one user_id")
        if len(user_id) > 512:
            self.refuse(name, "Messages takes at most 512 characters")
        else:
            self.params["metadata"] = {"user_id": user_id}

    def service_tier(self, tier: Any) -> None:
        if tier in _TIERS:
            self.params["service_tier"] = _TIERS[tier]
        else:
            self.refuse("service_tier", f"Messages has no tier {tier!r}, only {', '.join(_TIERS)}")

    def reasoning_effort(self, effort: Any) -> None:
        if effort in _EFFORTS:
            self.params.setdefault("output_config", {})["effort"] = effort
        elif effort == "none":
            self.params["thinking"] = {"type": "disabled"}
        else:
            self.refuse("reasoning_effort", f"Messages has no effort {effort!r}, only {', '.join(_EFFORTS)}")

    def response_format(self, wanted: Any) -> None:
        kind = wanted.get("type") if isinstance(wanted, dict) else wanted
        if kind == "text":
            return
        if kind != "json_schema":
            self.refuse("response_format", f"Messages has no format {kind!r}: use json_schema")
            return
        named = wanted.get("json_schema")
        named = named if isinstance(named, dict) else {}
        schema = named.get("schema")
        if not isinstance(schema, dict):
            raise Malformed("response_format.json_schema.schema", "is required")
        # The name is only a label. The description informs the model, and can be a part of the schema.
        described = {"description": named["description"]} if named.get("description") else {}
        format_ = {"type": "json_schema", "schema": described | schema}
        self.params.setdefault("output_config", {})["format"] = format_

    def tools(self, tools: Any) -> None:
        if not is_list(tools):
            raise Malformed("tools", "must be a list")
        translated = [self.tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
        if kept := [tool for tool in translated if tool is not None]:
            self.params["tools"] = kept

    def tool(self, tool: Any, at: str) -> dict[str, Any] | None:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            self.refuse(at, f"only function tools can be translated, not {kind}")
            return None
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed(f"{at}.function.name", "is required")
        schema = function.get("parameters") or {"properties": {}}
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise Malformed(f"{at}.function.parameters", "must be the schema of an object")
        result = {"name": function["name"], "input_schema": {"type": "object", **schema}}
        optional = ("description", "strict")
        return result | {key: function[key] for key in optional if function.get(key) is not None}

    def tool_choice(self) -> None:
        """Translate `tool_choice`, after the tools, on which it depends, and `parallel_tool_calls`."""
        choice: dict[str, Any] = self.chosen(self.body.get("tool_choice", "auto")) or {"type": "auto"}
        names = [tool["name"] for tool in self.params.get("tools", [])]
        possible = {"any": bool(names), "tool": choice.get("name") in names}
        if not possible.get(choice["type"], True):
            self.refuse("tool_choice", "asks for a tool that is not in tools")
            choice = {"type": "auto"}
        if not names:
            return
        if self.body.get("parallel_tool_calls") is False and choice["type"] != "none":
            choice["disable_parallel_tool_use"] = True
        if choice != {"type": "auto"}:
            self.params["tool_choice"] = choice

    def chosen(self, choice: Any) -> dict[str, Any] | None:
        if isinstance(choice, str) and choice in _CHOICES:
            return {"type": _CHOICES[choice]}
        members = choice if isinstance(choice, dict) else {}
        try:
            if members.get("type") == "function":
                return {"type": "tool", "name": members["function"]["name"]}
            if members.get("type") == "allowed_tools":
                allowed = members["allowed_tools"]
                names = {tool["function"]["name"] for tool in allowed["tools"]}
                tools = self.params.get("tools", [])
                self.params["tools"] = [tool for tool in tools if tool["name"] in names]
                return self.chosen(allowed["mode"])
        except (KeyError, TypeError):
            raise Malformed("tool_choice", "is incomplete") from None
        self.refuse("tool_choice", f"Messages has no choice {members.get('type', choice)!r}")
        return None

    def later(self, _: Any) -> None:
        """Do nothing: `tool_choice` reads this parameter once the tools are known."""


_TRANSLATORS: dict[str, Callable[[_Translation, Any], None]] = {
    "max_completion_tokens": _Translation.max_tokens,
    "max_tokens": _Translation.max_tokens,
    "messages": _Translation.messages,
    "model": _Translation.model,
    "parallel_tool_calls": _Translation.later,
    "reasoning_effort": _Translation.reasoning_effort,
    "response_format": _Translation.response_format,
    "safety_identifier": _Translation.end_user,
    "service_tier": _Translation.service_tier,
    "stop": _Translation.stop,
    "temperature": _Translation.temperature,
    "tool_choice": _Translation.later,
    "tools": _Translation.tools,
    "top_p": _Translation.top_p,
    "user": _Translation.end_user,
}


def from_message(message: Mapping[str, Any], *, created: int) -> dict[str, Any]:
    """Translate a Message to a chat completion; `created` is unix seconds, which a Message does not have.

    Texts are joined without a separator, since citations split a sentence into several. Thinking becomes
    `reasoning_content`, and tool uses become tool calls.
    """
    texts, thoughts, calls = [], [], []
    for block in message.get("content") or []:
        match block.get("type"):
            case "text":
                texts.append(block["text"])
            case "thinking":
                thoughts.append(block["thinking"])
            case "tool_use":
                arguments = json.dumps(block["input"], ensure_ascii=False)
                function = {"name": block["name"], "arguments": arguments}
                calls.append({"id": block["id"], "type": "function", "function": function})
    answer: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts else None}
    reason = str(message.get("stop_reason"))
    refused = (message.get("stop_details") or {}) if reason == "refusal" else {}
    answer["refusal"] = refused.get("explanation")
    answer |= {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    answer |= {"tool_calls": calls} if calls else {}
    finish = _FINISH_REASONS.get(reason, "stop")
    return {
        "id": message.get("id"),
        "object": "chat.completion",
        "created": created,
        "model": message.get("model"),
        "choices": [{"index": 0, "message": answer, "logprobs": None, "finish_reason": finish}],
        "usage": _usage(message.get("usage") or {}),
    }


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Translate token counts: OpenAI includes cached tokens in the prompt's, Anthropic counts them apart."""
    cached = usage.get("cache_read_input_tokens") or 0
    written = usage.get("cache_creation_input_tokens") or 0
    prompt = (usage.get("input_tokens") or 0) + cached + written
    completion = usage.get("output_tokens") or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
    }


def error_status(error_type: str) -> int:
    """Return the HTTP status of an error type of Anthropic's; 500 for an unknown type."""
    return _ERROR_STATUS.get(error_type, 500)


def safe_id(custom_id: str) -> str:
    """Return a custom_id that Anthropic accepts: the same if possible, else one that starts with `ab_`.

    A single id outside `^[a-zA-Z0-9_-]{1,64}$` makes Anthropic refuse the whole batch. Ids of up to 45 bytes
    are encoded in base64url, so that `original_id` can decode them; longer ids become a digest. The mapping
    is the same in every process, and never maps two ids to one: an id that already starts with `ab_` is
    mapped, too.
    """
    if _SAFE_ID.fullmatch(custom_id) and not custom_id.startswith(_PREFIX):
        return custom_id
    written = _PREFIX + "b" + base64.urlsafe_b64encode(custom_id.encode()).decode().rstrip("=")
    return written if len(written) <= 64 else f"{_PREFIX}h{digest(custom_id)}"


def original_id(safe: str) -> str:
    """Invert `safe_id`; an id that is a digest, or that another program made, is returned unchanged."""
    if safe.startswith(_PREFIX + "b"):
        written = safe.removeprefix(_PREFIX + "b")
        with contextlib.suppress(ValueError):
            original = base64.urlsafe_b64decode(written + "=" * (-len(written) % 4)).decode()
            return original if safe_id(original) == safe else safe
    return safe
