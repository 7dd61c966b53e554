"""A router that drains asks whether another one serves.

Covered: what it makes of each answer and each failure of the API server. Not covered: how long draining lasts
(tests/runtime), routers in a cluster (tests/kube).
"""

from __future__ import annotations

import pytest

from router.discovery.replacement import Replacement
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.kube.listwatch import Watch
from runtime.kube.reflector import EventStream


class Failing:
    """An API server whose every list fails in one way. Nothing else is asked of it."""

    def __init__(self, cause: ApiFailureCause) -> None:
        self.cause = cause

    async def list(self) -> object:
        raise KubeApiError.of(self.cause, "no")

    async def watch(self, watch: Watch, slack: float) -> EventStream:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("cause", list(ApiFailureCause))
async def test_only_a_right_that_is_gone_says_that_nobody_will_tell(cause: ApiFailureCause) -> None:
    with pytest.raises(OSError, match="no") as raised:
        await Replacement(Failing(cause), "rag-router-0").serves()
    assert isinstance(raised.value, PermissionError) is (
        cause in {ApiFailureCause.FORBIDDEN, ApiFailureCause.UNAUTHORIZED}
    )
