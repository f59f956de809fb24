"""Translate the conversation of a chat completions body to the `system` and `messages` of Anthropic Messages.

Sources: Anthropic API reference, schemas `InputMessage` and `InputContentBlock`; OpenAI API reference "Create
chat completion", `messages`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Block = dict[str, Any]

_TOOL_ID = re.compile(r"[a-zA-Z0-9_-]+")
_DATA_URL = re.compile(r"data:([^;,]*)(?:;[^;,]*)*?;base64,(.*)", re.DOTALL)
_IMAGES = ("image/gif", "image/jpeg", "image/png", "image/webp")
# The members of a message that are translated, by role. `annotations` come from a model, and change nothing.
_MEMBERS = {
    "assistant": ("role", "content", "refusal", "tool_calls", "annotations"),
    "tool": ("role", "content", "tool_call_id", "name"),
}


class Untranslatable(ValueError):
    """A part of a chat body has no counterpart in Messages.

    Attributes:
        parameter: The path in the body, such as `messages[2].content[0]`.
        reason: Why it cannot be translated.
    """

    def __init__(self, parameter: str, reason: str) -> None:
        super().__init__(f"{parameter}: {reason}")
        self.parameter = parameter
        self.reason = reason


class Malformed(Untranslatable):
    """A part of a chat body is broken, so that leaving it out would not make the request valid."""


def digest(text: str) -> str:
    """Return a digest of `text`: 52 characters of a-z2-7."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=").lower()


def is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


class Turns:
    """Translates message by message; `system` and `turns` are the result so far.

    It calls `refuse(parameter, reason)` for a part without a counterpart, and leaves that out if the call
    returns. A broken part raises Malformed.
    """

    def __init__(self, refuse: Callable[[str, str], None]) -> None:
        self.refuse = refuse
        self.system: list[str] = []
        self.turns: list[dict[str, Any]] = []

    def add(self, message: Any, at: str) -> None:
        if not isinstance(message, dict):
            raise Malformed(at, "must be an object")
        role = str(message.get("role"))
        self.only(message, _MEMBERS.get(role, ("role", "content")), at)
        match role:
            case "system" | "developer":
                self.system.extend(self.texts(message.get("content"), f"{at}.content"))
            case "user":
                self.user(message, at)
            case "assistant":
                self.assistant(message, at)
            case "tool":
                self.tool_result(message, at)
            case _:
                self.refuse(f"{at}.role", f"Messages has no role {role!r}")

    def only(self, value: Mapping[str, Any], known: tuple[str, ...], at: str) -> None:
        """Refuse the members of `value` that are not translated, unless they are empty."""
        for name in value:
            if name not in known and value[name]:
                self.refuse(f"{at}.{name}", "has no counterpart in Messages")

    def user(self, message: dict[str, Any], at: str) -> None:
        content = message.get("content")
        if not isinstance(content, str):
            content = self.parts(content, f"{at}.content")
        elif not content.strip():
            content = ""
        self.turn("user", content, at)

    def assistant(self, message: dict[str, Any], at: str) -> None:
        content = message.get("content")
        texts = [] if content is None else self.texts(content, f"{at}.content")
        texts += [message["refusal"]] if message.get("refusal") else []
        blocks: list[Block] = [{"type": "text", "text": text} for text in texts]
        for number, call in enumerate(message.get("tool_calls") or []):
            blocks += self.tool_use(call, f"{at}.tool_calls[{number}]")
        self.turn("assistant", texts[0] if len(texts) == len(blocks) == 1 else blocks, at)

    def turn(self, role: str, content: str | list[Block], at: str) -> None:
        # Consecutive turns of one role are not joined: the API itself does that.
        if content:
            self.turns.append({"role": role, "content": content})
        else:
            self.refuse(f"{at}.content", "Messages takes no empty message")

    def tool_use(self, call: Any, at: str) -> list[Block]:
        if not isinstance(call, dict) or not isinstance(call.get("id"), str):
            raise Malformed(at, "must be an object with an id")
        function = call.get("function")
        if call.get("type", "function") != "function" or not isinstance(function, dict):
            self.refuse(at, "only function calls can be translated")
            return []
        try:
            # Models send an empty string for no arguments.
            arguments = json.loads(function.get("arguments") or "{}")
        except (ValueError, TypeError) as error:
            raise Malformed(f"{at}.function.arguments", f"is not JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise Malformed(f"{at}.function.arguments", "must be a JSON object")
        if not isinstance(name := function.get("name"), str):
            raise Malformed(f"{at}.function.name", "is required")
        return [{"type": "tool_use", "id": _tool_id(call["id"]), "name": name, "input": arguments}]

    def tool_result(self, message: dict[str, Any], at: str) -> None:
        if not isinstance(message.get("tool_call_id"), str):
            raise Malformed(f"{at}.tool_call_id", "is required")
        result: Block = {"type": "tool_result", "tool_use_id": _tool_id(message["tool_call_id"])}
        content = message.get("content")
        if content := content if isinstance(content, str) else self.parts(content, f"{at}.content"):
            result["content"] = content
        # Messages wants the results of parallel calls in one turn.
        last = self.turns[-1]["content"] if self.turns else None
        if isinstance(last, list) and last[-1]["type"] == "tool_result":
            last.append(result)
        else:
            self.turns.append({"role": "user", "content": [result]})

    def texts(self, content: Any, at: str) -> list[str]:
        """Return the texts of content that may only be text, without empty ones."""
        if isinstance(content, str):
            return [content] if content.strip() else []
        return [block["text"] for block in self.parts(content, at, only=("text", "refusal"))]

    def parts(self, content: Any, at: str, *, only: tuple[str, ...] = ()) -> list[Block]:
        if not is_list(content):
            raise Malformed(at, "must be a string or a list of parts")
        blocks = [self.part(part, f"{at}[{index}]", only) for index, part in enumerate(content)]
        return [block for block in blocks if block is not None]

    def part(self, part: Any, at: str, only: tuple[str, ...]) -> Block | None:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise Malformed(at, "must be an object with a type")
        translate = _PARTS.get(kind)
        if translate is None or (only and kind not in only):
            self.refuse(at, f"Messages takes no {kind} part here")
            return None
        self.only(part, ("type", kind), at)
        inner = part.get(kind)
        if not isinstance(inner, str if translate is Turns.text else dict):
            raise Malformed(f"{at}.{kind}", "is missing or of the wrong type")
        return translate(self, inner, f"{at}.{kind}")

    def text(self, text: str, at: str) -> Block | None:
        return {"type": "text", "text": text} if text.strip() else None

    def image(self, image: dict[str, Any], at: str) -> Block | None:
        self.only(image, ("url", "detail") if image.get("detail") == "auto" else ("url",), at)
        url = str(image.get("url"))
        if re.match(r"https?://", url):
            return {"type": "image", "source": {"type": "url", "url": url}}
        media_type, data = _data_url(url, f"{at}.url")
        media_type = "image/jpeg" if media_type == "image/jpg" else media_type
        if media_type not in _IMAGES:
            self.refuse(f"{at}.url", f"Messages reads {', '.join(_IMAGES)}, not {media_type}")
            return None
        return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}

    def file(self, file: dict[str, Any], at: str) -> Block | None:
        data, name = file.get("file_data"), str(file.get("filename") or "")
        if not isinstance(data, str):
            self.refuse(at, "only a file sent along as file_data can be translated")
            return None
        if data.startswith("data:"):
            media_type, data = _data_url(data, f"{at}.file_data")
        else:
            media_type = "text/plain" if name.endswith(".txt") else "application/pdf"
        source = {"type": "base64", "media_type": media_type, "data": data}
        if media_type == "text/plain":
            source.update(type="text", data=_base64_text(data, f"{at}.file_data"))
        elif media_type != "application/pdf":
            self.refuse(f"{at}.file_data", f"Messages reads PDF and plain text, not {media_type}")
            return None
        return {"type": "document", "source": source} | ({"title": name[:500]} if name else {})


_PARTS: dict[str, Callable[[Turns, Any, str], Block | None]] = {
    "text": Turns.text,
    "refusal": Turns.text,
    "image_url": Turns.image,
    "file": Turns.file,
}


def _tool_id(call_id: str) -> str:
    """Return a tool call's id in the characters that Messages accepts (some ids look like `f.get:0`)."""
    return call_id if _TOOL_ID.fullmatch(call_id) else f"call_{digest(call_id)}"


def _data_url(url: str, at: str) -> tuple[str, str]:
    """Return the media type and the base64 text of a data URL."""
    parts = _DATA_URL.fullmatch(url)
    if parts is None:
        raise Malformed(at, f"is not a base64 data URL: {url[:40]!r}")
    return parts[1].lower(), parts[2]


def _base64_text(data: str, at: str) -> str:
    try:
        return base64.b64decode(data, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise Malformed(at, f"is not base64 of UTF-8 text: {error}") from None
