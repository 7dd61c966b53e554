"""What Envoy writes about requests: a line for each, without any of what they say."""

from __future__ import annotations

from typing import Any, Literal

from runtime.envoy.messages import Message, extension

_FIELDS = {
    "at": "%START_TIME(%s.%6f)%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "method": "%REQ(:METHOD)%",
    "path": "%PATH(NQ:PATH)%",
    "status": "%RESPONSE_CODE%",
    "bytes": "%BYTES_SENT%",
    "body_bytes": "%BYTES_RECEIVED%",
    "milliseconds": "%DURATION%",
    "first_byte_milliseconds": "%RESPONSE_DURATION%",
    "worker": "%UPSTREAM_HOST%",
    "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "why": "%RESPONSE_CODE_DETAILS%",
    "flags": "%RESPONSE_FLAGS%",
}


def access_logs(form: Literal["off", "text", "json"]) -> list[Message]:
    """The access log on standard output."""
    if form == "off":
        return []
    written: dict[str, Any] = (
        {"json_format": {"event": "request", **_FIELDS}}
        if form == "json"
        else {
            "text_format_source": {
                "inline_string": "event=request "
                + " ".join(f"{name}={value}" for name, value in _FIELDS.items())
                + "\n"
            }
        }
    )
    written["omit_empty_values"] = True
    return [extension("stdout", "access_loggers.stream.v3.StdoutAccessLog", log_format=written)]
