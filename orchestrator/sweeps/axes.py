"""What an axis of a sweep may hold: a list of values, a range, encoder shapes and rules for them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Discriminator, Field, Tag

from sae.config import KronShape

Positive = Annotated[int, Field(ge=1)]
T = TypeVar("T")
Listed = Annotated[tuple[T, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class IntRange:
    """Whole numbers, both ends included."""

    min: int
    max: int

    log: bool = False
    """Whether they are drawn evenly on a logarithmic scale."""

    def __post_init__(self) -> None:
        """Refuse ranges that hold nothing."""
        _refuse_empty(self)

    @property
    def size(self) -> int | float:
        """How many numbers there are."""
        return self.max - self.min + 1

    def draw(self, rng: Random) -> int:
        """One of them."""
        if not self.log:
            return rng.randint(self.min, self.max)
        exponent = rng.uniform(math.log(self.min - 0.5), math.log(self.max + 0.5))
        return min(max(round(math.exp(exponent)), self.min), self.max)


@dataclass(frozen=True, kw_only=True)
class FloatRange:
    """Numbers of four significant digits, so that a trial's name can tell them."""

    min: float
    max: float

    log: bool = False
    """Whether they are drawn evenly on a logarithmic scale."""

    def __post_init__(self) -> None:
        """Refuse ranges that hold nothing."""
        _refuse_empty(self)

    @property
    def size(self) -> int | float:
        """How many numbers there are: more than are ever drawn."""
        return math.inf

    def draw(self, rng: Random) -> float:
        """One of them."""
        if self.log:
            return self.rounded(math.exp(rng.uniform(math.log(self.min), math.log(self.max))))
        return self.rounded(rng.uniform(self.min, self.max))

    def rounded(self, value: float) -> float:
        """A number of the range to four digits."""
        return min(max(float(f"{value:.4g}"), self.min), self.max)


def _refuse_empty(span: IntRange | FloatRange) -> None:
    if not span.min < span.max < math.inf:
        raise ValueError(
            f"max: {span.max} is not above min = {span.min}, or has no end; give two numbers that rise, "
            "or a list of one"
        )
    if span.log and span.min <= 0:
        raise ValueError(f"min: {span.min} has no logarithm; give a positive number, or log: false")


Range = IntRange | FloatRange
R = TypeVar("R", IntRange, FloatRange)

ListOrRange = Annotated[
    Annotated[tuple[T, ...], Field(min_length=1), Tag("list")] | Annotated[R, Tag("range")],
    Discriminator(lambda value: "range" if isinstance(value, Mapping | Range) else "list"),
]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A Kronecker shape whose number of heads follows from d_sae."""

    m: int
    n: int
    activation: Literal["mand", "relu_product"]


@dataclass(frozen=True, kw_only=True)
class KronFactors:
    """The factors of a rule: every m with every n."""

    m: Listed[Positive]
    n: Listed[Positive]
    activation: Literal["mand", "relu_product"] = "mand"


@dataclass(frozen=True, kw_only=True)
class KronRule:
    """All shapes of some factors, with h = d_sae / (m*n)."""

    kron: KronFactors

    @property
    def heads(self) -> Iterator[Heads]:
        """Of every m with every n."""
        kron = self.kron
        return (Heads(m=m, n=n, activation=kron.activation) for m in kron.m for n in kron.n)


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "dense"
    by_rule = isinstance(value, KronRule) or (isinstance(value, Mapping) and "kron" in value)
    return "rule" if by_rule else "shape"


EncoderShapes = Annotated[
    Annotated[Literal["dense"], Tag("dense")]
    | Annotated[KronShape, Tag("shape")]
    | Annotated[KronRule, Tag("rule")],
    Discriminator(_kind),
]
"""One encoder, or several by a rule."""

Encoder = Literal["dense"] | KronShape | Heads


def at_width(encoder: Encoder, d_sae: int) -> Literal["dense"] | KronShape:
    """The encoder of so many latents.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(encoder, Heads):
        h, rest = divmod(d_sae, encoder.m * encoder.n)
        if rest:
            raise ValueError(
                f"m*n = {encoder.m}*{encoder.n} = {encoder.m * encoder.n} does not divide "
                f"d_sae = {d_sae}, so no h fits; choose another m or n"
            )
        return KronShape(h=h, m=encoder.m, n=encoder.n, activation=encoder.activation)
    if isinstance(encoder, KronShape) and encoder.d_sae != d_sae:
        raise ValueError(
            f"h*m*n = {encoder.h}*{encoder.m}*{encoder.n} = {encoder.d_sae} is not "
            f"d_sae = {d_sae}; {_suggest_heads(d_sae, encoder)}"
        )
    return encoder


def _suggest_heads(d_sae: int, shape: KronShape) -> str:
    heads, rest = divmod(d_sae, shape.m * shape.n)
    if rest == 0:
        return f"with this m and n, h must be {heads}"
    return f"m*n = {shape.m * shape.n} does not divide d_sae, so choose another m or n"
