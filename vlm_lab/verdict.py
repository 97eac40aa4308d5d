"""What a sweep says about a published claim: an ordering of arms, tested link by link.

A claim is `a > b`, a chain `a > b > c`, or `a = b` (no difference larger than a margin). Its verdict is that of its
weakest link:

    reproduced       significant in the claimed direction, and the interval reaches to within a factor of
                     two of the published size
    direction only   significant in the claimed direction; larger or smaller than that, or no size was published
    underpowered     the interval covers both no difference and the published one: nothing can be said yet
    contradicted     significant the other way round, or an interval that excludes a difference of the published size
    not comparable   the runs do not answer the question: some are missing, or no arm is above the majority answer

A verdict holds for the scale and the data that the arms ran at, which the report says beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_lab.stats import ALPHA, Estimate

VERDICTS = ("reproduced", "direction only", "underpowered", "contradicted", "not comparable")  # from best to worst
FACTOR = 2.0  # a difference "as large as published" is between the published one / FACTOR and x FACTOR


@dataclass(frozen=True)
class Verdict:
    verdict: str
    reason: str


def judge(difference: Estimate, adjusted_p: float, published: float | None, unit: str = "points") -> Verdict:
    """The verdict of `left > right`, given left - right in `unit`, its p after correction, and the published one."""
    size = f"{show(difference, unit)}, p = {adjusted_p:.2g} after correction"
    size += "" if published is None else f"; published {published:+.2f}"
    if difference.seeds < 2:
        return Verdict("underpowered", f"one seed, so chance between runs is unknown: {size}")
    if adjusted_p < ALPHA and difference.mean < 0:
        return Verdict("contradicted", f"significant the other way round: {size}")
    if adjusted_p < ALPHA:
        return significant(difference, published, size)
    needs = f"{difference.spread.detectable():.1f} {unit} would be found with 80 % power"
    if published is not None and published > 0 and difference.interval()[1] < published:
        return Verdict("contradicted", f"no significant difference, and one of the published size is excluded: {size}")
    return Verdict("underpowered", f"no significant difference: {size}; {needs}")


def significant(difference: Estimate, published: float | None, size: str) -> Verdict:
    if published is None or published <= 0:
        return Verdict("direction only", f"no size was published to compare with: {size}")
    low, high = difference.interval()
    if high < published / FACTOR or low > published * FACTOR:
        word = "smaller" if difference.mean < published else "larger"
        return Verdict("direction only", f"more than {FACTOR:g} times {word} than published: {size}")
    return Verdict("reproduced", f"significant, and it may be of the published size: {size}")


def judge_equal(difference: Estimate, margin: float, unit: str = "points") -> Verdict:
    """The verdict of `left = right`: two one-sided tests, that is, the 90 % interval against +- `margin`."""
    (low, high), narrow = difference.interval(), difference.interval(alpha=2 * ALPHA)
    size = f"{show(difference, unit)}, margin {margin:g}"
    if difference.seeds < 2:
        return Verdict("underpowered", f"one seed, so chance between runs is unknown: {size}")
    if max(map(abs, narrow)) <= margin:
        return Verdict("reproduced", f"equal within the margin: {size}")
    if low > margin or high < -margin:
        return Verdict("contradicted", f"the difference is larger than the margin: {size}")
    return Verdict("underpowered", f"the interval reaches beyond the margin: {size}")


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of a chain: that of its weakest link."""
    return max(verdicts, key=lambda verdict: VERDICTS.index(verdict.verdict))


def show(value: Estimate, unit: str = "points") -> str:
    low, high = value.interval()
    return f"{value.mean:+.1f} {unit} [{low:+.1f}, {high:+.1f}]"
