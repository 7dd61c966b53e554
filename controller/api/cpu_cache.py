"""The cache that an engine keeps in the host's memory, as a manifest describes it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from controller.api.common import SpecModel

_UNITS = {"M": 10**6, "G": 10**9, "T": 10**12, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_PATTERN = r"^[1-9][0-9]{0,6}(M|G|T|Mi|Gi|Ti)$"

Bytes = Annotated[str, Field(pattern=_PATTERN, max_length=9)]
"""A whole number with one of Kubernetes' larger units, such as 32Gi."""


def _bytes(quantity: str) -> int:
    number = quantity.rstrip("MGTi")
    return int(number) * _UNITS[quantity.removeprefix(number)]


class CpuCache(SpecModel):
    """Copies of blocks in the host's memory, which an engine loads back faster than it computes them. Routers count
    what that takes."""

    size: Bytes
    """Memory for the copies of each engine, such as 32Gi. `workers.resources` has to request it in addition to what the
    engine itself needs; with vLLM it is shared memory (`/dev/shm`), which counts as the container's."""
    bandwidth: Bytes | None = None
    """Bytes a second at which they are loaded, such as 25G. Default: the profile's. With vLLM routers believe it only
    until loads have been measured."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all copies of one engine."""
        return _bytes(self.size)

    @property
    def bandwidth_bytes(self) -> int | None:
        """Bytes a second; None: as the profile says."""
        return _bytes(self.bandwidth) if self.bandwidth is not None else None
