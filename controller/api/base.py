"""What every part of the manifest's model has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError


class _ClusterOnly:
    """Marks a field that only Kubernetes can honour."""


CLUSTER_ONLY = _ClusterOnly()


class SpecModel(BaseModel):
    """What every part of a manifest has in common."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
    )


def rule_broken(path: str, message: str) -> PydanticCustomError:
    """A rule across fields is broken; `path` names the field to change, relative to the model that checks."""
    return PydanticCustomError("rule", "{message}", {"message": message, "path": path})
