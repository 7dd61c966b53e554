"""`kvcluster route`: where a router would send a prompt, and why."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import httpx
import orjson
from rich.table import Column, Table

from kvcluster.options import management_headers, management_url, tls_context
from kvcluster.terminal import BAD_INPUT, FAILED, complain, output

TIMEOUT = 30.0
_PARTS = ("queue", "load", "prefill", "decode", "charge")
"""What the cost is the sum of."""
_RARE = ("load", "charge")
"""Parts that are shown only where some worker has them."""


class NoExplanationError(RuntimeError):
    """The router gave no explanation; the message says why and what to do."""


def request_body(prompt: str, *, chat: bool, model: str | None) -> dict[str, Any]:
    """The OpenAI request whose route is asked for."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    return body if model is None else {**body, "model": model}


def ask_router(router: str, body: Mapping[str, Any], transport: httpx.BaseTransport | None = None) -> dict[str, Any]:
    """The router's answer to `POST /route/explain`. Raises `NoExplanationError`."""
    url = f"{management_url(router)}/route/explain"
    try:
        with httpx.Client(
            trust_env=False,
            timeout=TIMEOUT,
            transport=transport,
            headers=management_headers(),
            verify=tls_context(None),
        ) as client:
            answer = client.post(url, json=body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NoExplanationError(
            f"no router answers at {router} ({error}); --router takes its management URL"
        ) from None
    try:
        content = answer.json()
    except ValueError:
        content = None
    if answer.is_success and type(content) is dict and "decision" in content:
        return content
    said = content.get("error", content) if type(content) is dict else answer.text[:200]
    said = said.get("message", said) if type(said) is dict else said
    raise NoExplanationError(f"{url} answered {answer.status_code}: {said}")


def seconds(value: float | None) -> str:
    """A duration in seconds, shown in milliseconds."""
    return "-" if value is None else f"{1000 * value:,.1f} ms"


def candidates_table(explanation: Mapping[str, Any]) -> Table:
    """A row for each candidate, the cheapest first, with a mark on the chosen one."""
    decision = explanation["decision"]
    prompt_blocks = decision.get("prompt_blocks")
    parts = [
        part
        for part in _PARTS
        if part not in _RARE or any(row["cost_parts"][part] for row in explanation["candidates"])
    ]
    headings = ("matched blocks", *parts, "cost", "in flight")
    figures = (Column(heading, justify="right") for heading in headings)
    table = Table("worker", *figures, title=headline(decision), title_justify="left")
    for row in sorted(explanation["candidates"], key=lambda row: (row["cost"], row["worker"] != decision["worker_id"])):
        chosen = row["worker"] == decision["worker_id"]
        table.add_row(
            f"{'→' if chosen else ' '} {row['worker']}",
            _matched(row, prompt_blocks),
            *(seconds(row["cost_parts"][part]) for part in parts),
            seconds(row["cost"]),
            f"{row['in_flight']:,}",
            style="bold green" if chosen else "",
        )
    return table


def _matched(row: Mapping[str, Any], prompt_blocks: int | None) -> str:
    if row.get("matching") is False:
        return "by load alone"
    loaded = "".join(f", {blocks:,} from {tier}" for tier, blocks in row.get("loaded_blocks", {}).items())
    return f"{row['matched_blocks']:,}" + ("" if prompt_blocks is None else f" of {prompt_blocks:,}") + loaded


def headline(decision: Mapping[str, Any]) -> str:
    """The decision in one line."""
    ttft = seconds(decision.get("predicted_ttft"))
    return f"{decision['worker_id']} ({decision['strategy']}: {decision['reason']}), first token expected in {ttft}"


def route(prompt: str, *, router: str, chat: bool, model: str | None, as_json: bool) -> int:
    """Runs the command; returns its exit code."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        complain("the prompt is empty")
        return BAD_INPUT
    try:
        explanation = ask_router(router, request_body(text, chat=chat, model=model))
    except ValueError as error:  # authorities that are none
        complain(error)
        return BAD_INPUT
    except NoExplanationError as error:
        complain(error)
        return FAILED
    if as_json:
        sys.stdout.write(orjson.dumps(explanation, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())
    else:
        output().print(candidates_table(explanation))
    return 0
