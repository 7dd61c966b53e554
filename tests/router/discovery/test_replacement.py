"""A router that drains asks whether another one serves.

Covered: what each list of the Service's endpoints means, and each failure of the API server. Not covered: how long
draining lasts (tests/runtime/test_draining.py), routers in a cluster (tests/kube).
"""

from __future__ import annotations

from typing import Any

import pytest

from router.discovery.kubernetes import Replacement
from runtime.kube.errors import ApiFailureCause, KubeApiError
from runtime.kube.listwatch import Watch
from runtime.kube.reflector import EventStream
from tests.router.discovery.slices import endpoint, endpoint_slice


class Answering:
    """An API server that gives one answer to every list, or fails in one way. Nothing else is asked of it."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    async def list(self) -> object:
        if isinstance(self._answer, ApiFailureCause):
            raise KubeApiError.of(self._answer, "no")
        return self._answer

    async def watch(self, watch: Watch, slack: float) -> EventStream:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("cause", list(ApiFailureCause))
async def test_only_a_right_that_is_gone_says_that_nobody_will_tell(cause: ApiFailureCause) -> None:
    with pytest.raises(OSError, match="no") as raised:
        await Replacement(Answering(cause), "rag-router-0").serves()
    assert isinstance(raised.value, PermissionError) is (
        cause in {ApiFailureCause.FORBIDDEN, ApiFailureCause.UNAUTHORIZED}
    )


SELF = endpoint("10.0.0.1", "rag-router-0", ready=False, serving=True, terminating=True)


@pytest.mark.parametrize(
    ("endpoints", "serves"),
    [
        pytest.param([], True, id="the Service is gone"),
        pytest.param([SELF], False, id="only this router"),
        pytest.param([SELF, endpoint("10.0.0.2", "rag-router-1", ready=True)], True, id="another one is ready"),
        pytest.param([SELF, endpoint("10.0.0.2", "rag-router-1", ready=False)], False, id="another one is not ready"),
        pytest.param(
            [SELF, endpoint("10.0.0.2", "rag-router-1", ready=False, serving=True, terminating=True)],
            False,
            id="another one drains too",
        ),
        pytest.param([endpoint("10.0.0.1", "rag-router-0", ready=True)], False, id="this router is still called ready"),
    ],
)
async def test_only_another_router_that_is_ready_replaces_this_one(
    endpoints: list[dict[str, Any]], serves: bool
) -> None:
    found = {"items": [endpoint_slice("routers", *endpoints)] if endpoints else []}
    assert await Replacement(Answering(found), "rag-router-0").serves() is serves
