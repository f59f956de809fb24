"""Validate an upload or a create; the lines of the input are validated after the create."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from . import faults, standin
from .protocol import Refusal
from .validation import read_request

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
DAY = 24 * 3600.0
FILE_LIFETIME = 30 * DAY  # OpenAI's default for batch files
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY}
CREATE_FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after")


def check_upload(values: Mapping[str, str], filename: str | None) -> str:
    """Check an upload, and return its purpose."""
    purpose = values.get("purpose")
    if filename is None:
        raise Refusal(400, "Missing required parameter: 'file'.", param="file")
    if not purpose:
        raise Refusal(400, "Missing required parameter: 'purpose'.", param="purpose")
    if purpose not in PURPOSES:
        raise Refusal(400, f"'{purpose}' is not one of {', '.join(PURPOSES)}.", param="purpose")
    if purpose == "batch" and not filename.endswith(".jsonl"):
        raise Refusal(400, "Invalid file format for Batch API. Must be .jsonl", param="file")
    return purpose


def read_lifetime(values: Mapping[str, str]) -> float | None:
    """Return an upload's `expires_after` in seconds; OpenAI writes it with brackets, Azure with a dot."""
    text = values.get("expires_after[seconds]", values.get("expires_after.seconds"))
    if text is None:
        return None
    return check_lifetime(int(text) if text.isdecimal() else None, "expires_after")


def check_lifetime(seconds: Any, param: str) -> float:
    if not isinstance(seconds, int) or not 3600 <= seconds <= FILE_LIFETIME:
        raise Refusal(400, f"'{param}.seconds' must be a whole number from 3600 to 2592000.", param=param)
    return float(seconds)


def check_create(
    asked: Mapping[str, Any], *, any_endpoint: bool
) -> tuple[float, dict[str, str] | None, float | None]:
    """Check a create; return its window (seconds), metadata, and the lifetime of its results (seconds)."""
    for name in asked:
        if name not in CREATE_FIELDS:
            raise Refusal(400, f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)
    for name in CREATE_FIELDS[:3]:
        if not isinstance(asked.get(name), str):
            message = f"Missing required parameter: '{name}'."
            raise Refusal(400, message, code="missing_required_parameter", param=name)
    endpoint = asked["endpoint"]
    if not (standin.supported(endpoint) or (any_endpoint and endpoint.startswith("/v1/"))):
        known = ", ".join(standin.ENDPOINTS)
        raise Refusal(
            400,
            f"Invalid value: '{endpoint}'. Supported are {known}.",
            code="invalid_value",
            param="endpoint",
        )
    window = re.fullmatch(r"([1-9]\d{0,8})([smhd])", asked["completion_window"])
    if not window:
        message = "'completion_window' must be like 24h, 7d, 30m or 10s."
        raise Refusal(400, message, code="invalid_value", param="completion_window")
    lifetime = asked.get("output_expires_after")
    if lifetime is not None:
        lifetime = check_lifetime(
            lifetime.get("seconds") if isinstance(lifetime, dict) else None, "output_expires_after"
        )
    return int(window[1]) * UNITS[window[2]], check_metadata(asked.get("metadata")), lifetime


def check_metadata(metadata: Any) -> dict[str, str] | None:
    if metadata is None:
        return None
    if not isinstance(metadata, dict):
        raise Refusal(400, "'metadata' must be an object.", param="metadata")
    if len(metadata) > 16:
        raise Refusal(400, f"'metadata' has {len(metadata)} pairs; at most 16 are allowed.", param="metadata")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise Refusal(
                400, f"The value of metadata '{key[:64]}' must be a string.", param=f"metadata.{key[:64]}"
            )
        if len(key) > 64 or len(value) > 512:
            message = f"Metadata '{key[:64]}': keys have at most 64 characters, values 512."
            raise Refusal(400, message, param=f"metadata.{key[:64]}")
    return metadata


def first_model(lines: Iterable[bytes]) -> str | None:
    """Return the model of the first line; None if it cannot be read or stored, as validation will report."""
    for line in lines:
        if line.strip():
            try:
                model = read_request(line)[0]["body"]["model"]
                model.encode()  # half a surrogate pair cannot be stored, so the create would fail
            except (LookupError, TypeError, AttributeError, UnicodeError):
                return None
            return model or None
    return None


def disturbance(model: str | None) -> float:
    """Return how long after its creation a batch's model may disturb the server, in seconds."""
    try:
        ask = faults.parse(model)
    except faults.ModelError:
        return 0.0
    return max(window[1] if window else 0.0 for window in (ask.outage, ask.throttle))
