"""`spec.model.latency`: the times of an engine where they differ from the profile's."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from controller.api.common import SpecModel
from kvcache.profiles import Profile

Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]


class Latency(SpecModel):
    """Times of the engine in seconds, as `kvcluster profile fit` prints them. The others are the profile's. A router
    starts from them, and the emulator takes exactly as long. See `docs/profiles.md`."""

    prefill_base: Seconds | None = None
    """A prefill, whatever its length."""
    prefill_block: Seconds | None = None
    """Each 16 tokens that it computes."""
    prefill_cached: Seconds | None = None
    """A prefill of which every full block is cached."""
    decode: Seconds | None = None
    """A step that makes one token for each sequence."""
    decode_sequence: Seconds | None = None
    """What each sequence adds to a step."""
    decode_token: Seconds | None = None
    """What each token of context of any of them adds."""

    def times(self) -> dict[str, float]:
        """Those that are given."""
        return {name: seconds for name, seconds in self.model_dump().items() if seconds is not None}

    def applied(self, profile: Profile) -> Profile:
        """The profile with these times in place of its own."""
        return replace(profile, latency=profile.latency.with_times(self.times()))
