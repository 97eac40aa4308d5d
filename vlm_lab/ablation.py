"""A published comparison as data: named arms, seeds, the paper's numbers, and what it claims. One YAML in sweeps/ each.

Read by the sweeper (vlm_lab/sweep.py), which runs arms x seeds, and by the report, which judges the claims. Nothing in
here decides any weights: an arm's overrides do, and those end up in the run's ordinary configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ARM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # usable as a file name and in an override


@dataclass(frozen=True)
class Link:
    """`left > right` or `left = right`, two arms."""

    left: str
    relation: str
    right: str

    def __str__(self) -> str:
        return f"{self.left} {self.relation} {self.right}"


def links(order: str) -> list[Link]:
    """`a > b > c` -> [a > b, b > c]. Raises ValueError if it is no such chain."""
    parts = re.split(r"\s*([>=])\s*", order.strip())
    if len(parts) < 3 or not all(parts):
        raise ValueError(f"{order!r} is no ordering of arms: write it as `a > b`, `a > b > c` or `a = b`")
    return [Link(*parts[start : start + 3]) for start in range(0, len(parts) - 2, 2)]


class Claim(BaseModel):
    """An ordering of arms in the accuracy, or words per answer, of one of our groups (`all`: the mean over groups)."""

    model_config = ConfigDict(extra="forbid", strict=True)
    order: str  # `a > b > c`, or `a = b` with a margin
    group: str = "all"
    measure: Literal["points", "words"] = "points"
    published: str | None = None  # the column of `Ablation.published` that it rests on; null: no size in points
    margin: float | None = Field(None, gt=0)  # how much `=` allows, in the measure

    @property
    def links(self) -> list[Link]:
        return links(self.order)

    @model_validator(mode="after")
    def readable(self) -> Claim:
        equal = any(link.relation == "=" for link in self.links)
        if equal != (self.margin is not None):
            raise ValueError(f"{self.order}: `=` needs a margin in {self.measure}, `>` takes none")
        return self


class Ablation(BaseModel):
    """`arms`: name -> overrides, as on the command line; the first is the baseline, with which all are compared."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    question: str
    source: str  # paper and table
    setting: str  # what the published numbers were measured with
    differs: str  # what is different at scale=tiny
    arms: dict[str, list[str]] = Field(min_length=2)
    seeds: list[int] = Field(min_length=1)
    published: dict[str, dict[str, float]] = {}  # arm -> {column of the paper's table: number}
    claims: list[Claim] = Field(min_length=1)
    arm: str | None = None  # of this run; set by the sweeper

    @field_validator("arms")
    @classmethod
    def usable(cls, arms: dict[str, list[str]]) -> dict[str, list[str]]:
        if wrong := [arm for arm in arms if not ARM.fullmatch(arm)]:
            raise ValueError(f"arm {wrong[0]!r}: use letters, digits and _ . + - only")
        return arms

    @model_validator(mode="after")
    def consistent(self) -> Ablation:
        named = {arm for claim in self.claims for link in claim.links for arm in (link.left, link.right)}
        if unknown := sorted((named | self.published.keys() | {self.arm or self.baseline}) - self.arms.keys()):
            raise ValueError(f"{unknown[0]}: no such arm; there are {', '.join(self.arms)}")
        for claim in self.claims:
            for link in claim.links:
                if claim.published is not None and self.published_difference(link, claim.published) is None:
                    raise ValueError(f"published.{link.left} and .{link.right} need the column {claim.published}")
        return self

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    def published_difference(self, link: Link, column: str | None) -> float | None:
        """left - right in the paper's table, in its own unit; None if it does not give both."""
        rows = [self.published.get(arm, {}).get(column or "") for arm in (link.left, link.right)]
        return None if rows[0] is None or rows[1] is None else rows[0] - rows[1]
