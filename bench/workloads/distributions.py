"""Distributions of lengths and times in workload files: a number, or a mapping that names a `distribution`."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from random import Random
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

LARGEST = 10_000_000
"""Above any length in tokens, and any time in seconds, that makes sense."""
Amount = Annotated[float, Field(ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]


class Strict(BaseModel):
    """A part of a workload file: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Bounded(Strict):
    """Values below `min` and above `max` become these."""

    min: Amount = 0
    max: Amount = LARGEST

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min:g}) is above max ({self.max:g})")
        return self

    def draw(self, random: Random) -> float:
        """One value."""
        return min(max(self._draw(random), self.min), self.max)

    def _draw(self, random: Random) -> float:
        raise NotImplementedError


class Constant(Strict):
    """Always `value`; a plain number stands for it."""

    distribution: Literal["constant"] = "constant"
    value: Amount

    def draw(self, random: Random) -> float:
        """The value."""
        return self.value


class Uniform(_Bounded):
    """Every value between `min` and `max` with the same probability."""

    distribution: Literal["uniform"]
    min: Amount
    max: Amount

    def _draw(self, random: Random) -> float:
        return random.uniform(self.min, self.max)


class Normal(_Bounded):
    """The normal distribution."""

    distribution: Literal["normal"]
    mean: Amount
    sd: Amount

    def _draw(self, random: Random) -> float:
        return random.gauss(self.mean, self.sd)


class LogNormal(_Bounded):
    """The logarithm is normal with the standard deviation `sigma`. The mean is median * exp(sigma**2 / 2)."""

    distribution: Literal["lognormal"]
    median: Positive
    sigma: Annotated[float, Field(ge=0, le=5)]

    def _draw(self, random: Random) -> float:
        return random.lognormvariate(log(self.median), self.sigma)


class Exponential(_Bounded):
    """The exponential distribution."""

    distribution: Literal["exponential"]
    mean: Positive

    def _draw(self, random: Random) -> float:
        return random.expovariate(1 / self.mean)


class Geometric(_Bounded):
    """1, 2, 3, ...: after each, it ends with the probability 1 / mean."""

    distribution: Literal["geometric"]
    mean: Annotated[float, Field(ge=1, le=10_000)]
    max: Annotated[float, Field(ge=1, le=10_000)] = 10_000

    def _draw(self, random: Random) -> float:
        value = 1
        while value < self.max and random.random() >= 1 / self.mean:
            value += 1
        return value


class Choice(Strict):
    """One of `values`; each with the same probability, or in proportion to `weights`."""

    distribution: Literal["choice"]
    values: Annotated[list[Amount], Field(min_length=1, max_length=10_000)]
    weights: list[Amount] | None = None

    @model_validator(mode="after")
    def _matching(self) -> Self:
        if self.weights is not None and (len(self.weights) != len(self.values) or not sum(self.weights)):
            raise ValueError(f"{len(self.values)} values take as many weights, which are not all 0")
        return self

    def draw(self, random: Random) -> float:
        """One value."""
        return random.choices(self.values, self.weights)[0]


def _kind(value: object) -> str:
    if isinstance(value, BaseModel):
        return str(getattr(value, "distribution", ""))
    return str(value.get("distribution", "")) if isinstance(value, dict) else "number"


class _Number(Constant):
    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return value if isinstance(value, dict | BaseModel) else {"value": value}


Distribution = Annotated[
    Annotated[_Number, Tag("number")]
    | Annotated[Constant, Tag("constant")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[Normal, Tag("normal")]
    | Annotated[LogNormal, Tag("lognormal")]
    | Annotated[Exponential, Tag("exponential")]
    | Annotated[Geometric, Tag("geometric")]
    | Annotated[Choice, Tag("choice")],
    Discriminator(
        _kind,
        custom_error_type="distribution",
        custom_error_message="it must be a number, or a mapping whose distribution is constant, uniform, normal, "
        "lognormal, exponential, geometric or choice",
    ),
]
"""A number, or one of the above."""

Draw = Callable[[Random], float]


def tokens(draw: Draw, random: Random) -> int:
    """A length in tokens: at least 1."""
    return max(1, round(draw(random)))


def mean(draw: Callable[[Random], float], name: str, samples: int = 5_000) -> float:
    """The mean of many draws; the same for the same name."""
    random = Random(f"mean of {name}")
    return sum(draw(random) for _ in range(samples)) / samples
