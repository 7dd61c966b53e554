"""A router that drains asks whether another one serves, and what it makes of an API server that does not say."""

from __future__ import annotations

import pytest

from router.discovery.kubernetes import EventStream
from router.discovery.listwatch import ApiFailure, Cause, Watch
from router.discovery.replacement import Replacement


class Failing:
    """An API server whose every list fails in one way. Nothing else is asked of it."""

    def __init__(self, cause: Cause) -> None:
        self.cause = cause

    async def list(self) -> object:
        raise ApiFailure(self.cause, "no")

    async def watch(self, watch: Watch, slack: float) -> EventStream:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("cause", list(Cause))
async def test_only_a_right_that_is_gone_says_that_nobody_will_tell(cause: Cause) -> None:
    with pytest.raises(OSError, match="no") as raised:
        await Replacement(Failing(cause), "rag-router-0").serves()
    assert isinstance(raised.value, PermissionError) is (cause in {Cause.FORBIDDEN, Cause.UNAUTHORIZED})
