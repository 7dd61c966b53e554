"""What the cost of a request depends on, apart from the worker."""

from __future__ import annotations

from typing import NamedTuple

from router.core.decision import RouteRequest
from router.core.lengths import AnswerKind, AnswerLengths, kind_of

MOST_TOKENS = 2**40
"""What a request says of its answer's length counts up to here: clients may write a number of any length."""


class Shape(NamedTuple):
    """What the cost of a request depends on, apart from the worker."""

    prompt_tokens: int
    prompt_blocks: int
    """Including a last partial one."""
    reusable_blocks: int
    """Full blocks that a worker may reuse on its GPU: never the one of the last token (vLLM rule 8)."""
    loadable_blocks: int
    """Full blocks that it may load from a slower tier; that of the last token is then computed again in part."""
    max_tokens: int | None
    """The most tokens that it allows its answer; None: no limit."""
    kind: AnswerKind
    output: float
    """Expected tokens of its answer."""


def shape_of(request: RouteRequest, block_size: int, lengths: AnswerLengths) -> Shape:
    """What the cost of this request depends on."""
    tokens, depth = request.prompt_tokens, request.keys.depth if request.keys is not None else 0
    most, hint = request.output_tokens, request.output_hint
    if most is not None and most > MOST_TOKENS:
        most = MOST_TOKENS
    if hint is not None and hint > MOST_TOKENS:
        hint = MOST_TOKENS
    kind = kind_of(request.model, most)
    if not request.prompted:
        return Shape(0, 0, 0, 0, 0, kind, 0.0)
    if tokens is None:
        tokens = depth * block_size + 1
    return Shape(
        prompt_tokens=tokens,
        prompt_blocks=-(-tokens // block_size),
        reusable_blocks=min(depth, max(tokens - 1, 0) // block_size),
        loadable_blocks=min(depth, tokens // block_size),
        max_tokens=most,
        kind=kind,
        output=lengths.expect(kind, most, hint),
    )
