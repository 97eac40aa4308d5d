"""Statistics of a sweep: arms that answered the same questions, under several seeds. numpy and scipy, no torch.

Every score here is a weighted mean over cells (task, group) of the mean over a cell's questions, in points (0 to 100).
Two things are random: the seed of a training run, and which images the questions are about. `compare` takes both into
account: d[seed, question] = a - b has a part per seed, a part per image and a rest, and the standard error adds the
variance over seeds and the variance over images (a bootstrap that resamples whole images), less the rest, which both
contain. Degrees of freedom after Satterthwaite, so that three seeds count as three. Claims are judged in verdict.py.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

ALPHA, POWER, RESAMPLES = 0.05, 0.8, 1000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Design:
    """Which cell (task, group) and which image each question belongs to: two arrays [Q] of codes counted from 0."""

    cells: NDArray[np.int64]
    images: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """(number of images, number of cells)"""
        return int(self.images.max()) + 1, int(self.cells.max()) + 1

    def sums(self, values: Array) -> Array:
        """Values per question [R, Q] -> their sums per image and cell [images, R, cells]."""
        images, cells = self.shape
        flat = self.images * cells + self.cells
        sums: Array = np.stack([np.bincount(flat, row, minlength=images * cells) for row in values])
        return sums.reshape(len(values), images, cells).transpose(1, 0, 2)

    def scores(self, values: Array, weights: Array) -> Array:
        """[R, Q] -> one score per row [R]: the weighted mean of the cells' means."""
        return weighted(self.sums(values).sum(0), self.sums(np.ones((1, len(self.cells)))).sum(0), weights)

    def resampled(self, values: Array, weights: Array) -> Array:
        """[R, Q] -> scores of `RESAMPLES` draws of whole images with replacement [draws, R].

        Draws that missed every cell of positive weight are left out.
        """
        draws, (images, cells) = counts(self.shape[0]), self.shape
        totals = (draws @ self.sums(values).reshape(images, -1)).reshape(RESAMPLES, len(values), cells)
        sizes = draws @ self.sums(np.ones((1, len(self.cells))))[:, 0]  # [RESAMPLES, cells]
        hit = (sizes * weights).sum(-1) > 0
        return weighted(totals[hit], sizes[hit][:, None], weights)


@cache
def counts(images: int) -> Array:
    """How often each image is in each bootstrap draw [RESAMPLES, images]; always the same draws."""
    rng = np.random.default_rng(0)
    return rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLES).astype(float)


def weighted(totals: Array, sizes: Array, weights: Array) -> Array:
    """Weighted mean over the last axis of totals / sizes; a cell that a draw missed leaves its weight to the others."""
    means = np.divide(totals, sizes, out=np.zeros_like(totals), where=sizes > 0)
    present = np.broadcast_to(weights * (sizes > 0), means.shape)
    return (means * present).sum(-1) / present.sum(-1)


@dataclass(frozen=True)
class Spread:
    """Where the error of a mean comes from: variance over images, over seeds, and the rest, which both contain.

    `seeds` = 1: chance between seeds is unknown and left out. `images` = 0: the questions are taken as given.
    """

    over_images: float
    over_seeds: float
    rest: float
    images: int
    seeds: int

    def total(self, over_seeds: Array) -> tuple[Array, Array]:
        """(variance of the mean, degrees of freedom after Satterthwaite), for these values of the variance over seeds.

        Two-way clustered (Cameron, Gelbach and Miller 2011), and never below either of its two parts.
        """
        if self.seeds == 1:
            return np.full_like(over_seeds, self.over_images), np.full_like(over_seeds, max(self.images - 1, 1))
        variance = np.maximum(self.over_images + np.maximum(over_seeds - self.rest, 0), over_seeds)
        doubt = self.over_images**2 / max(self.images - 1, 1) + over_seeds**2 / (self.seeds - 1)
        df = np.divide(variance**2, doubt, out=np.full_like(variance, self.seeds - 1), where=doubt > 0)
        return variance, df

    def power(self, difference: float, alpha: float = ALPHA) -> float:
        """The chance that a true difference of this size is called significant in a sweep with this spread.

        Averaged over what such a sweep would take for its variance over seeds, which few seeds tell poorly.
        """
        true = self.over_images + max(self.over_seeds - self.rest, 0.0)
        if true == 0:
            return 1.0 if difference else alpha
        parts = max(self.seeds - 1, 1)
        seen = self.over_seeds * stats.chi2.ppf((np.arange(200) + 0.5) / 200, parts) / parts
        variance, df = self.total(seen)
        limit = stats.t.isf(alpha / 2, df) * np.sqrt(variance / true)
        shift = abs(difference) / np.sqrt(true)
        return float((stats.norm.sf(limit - shift) + stats.norm.cdf(-limit - shift)).mean())

    def detectable(self, power: float = POWER, alpha: float = ALPHA) -> float:
        """The smallest true difference that is called significant with this `power`."""
        scale = np.sqrt(self.over_images + self.over_seeds)
        if scale == 0:
            return 0.0
        missing = lambda shift: self.power(shift * scale, alpha) - power  # noqa: E731
        return float(optimize.brentq(missing, 0.0, 1e3, xtol=1e-3) * scale)


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference in points, and the spread that its interval and its p value against zero follow from."""

    mean: float
    spread: Spread

    @property
    def se(self) -> float:
        return float(np.sqrt(self._total[0]))

    @property
    def df(self) -> float:
        return self._total[1]

    @property
    def seeds(self) -> int:
        return self.spread.seeds

    @property
    def p(self) -> float:
        """Two-sided, against zero."""
        return float(2 * stats.t.sf(abs(self.mean) / self.se, self.df)) if self.se > 0 else float(self.mean == 0)

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        half = float(stats.t.isf(alpha / 2, self.df)) * self.se
        return self.mean - half, self.mean + half

    @property
    def _total(self) -> tuple[float, float]:
        variance, df = self.spread.total(np.array([self.spread.over_seeds]))
        return float(variance[0]), float(df[0])


def over_seeds(scores: Array) -> Estimate:
    """The mean of one arm's scores [S], questions taken as given: Student's interval. It takes two seeds or more."""
    variance = float(scores.var(ddof=1)) / len(scores)
    return Estimate(float(scores.mean()), Spread(0.0, variance, 0.0, 0, len(scores)))


def compare(a: Array, b: Array, design: Design, weights: Array) -> Estimate:
    """Paired difference a - b in points.

    `a`, `b`: points per seed and question [S, Q] (0 or 100, or any score), same seeds and questions in the same order;
    `weights`: weight of each cell [cells]. With one seed, a reader must not generalise beyond that pair of runs.
    Clusters of questions in evaluations: Miller, arXiv 2411.00640.
    """
    d = np.asarray(a, float) - np.asarray(b, float)
    seeds, average = len(d), d.mean(0)
    rows = design.resampled(np.vstack([average, d - average]), weights)  # [draws, 1 + S]
    mean, over_images = float(design.scores(average[None], weights)[0]), float(rows[:, 0].var(ddof=1))
    if seeds == 1:
        return Estimate(mean, Spread(over_images, 0.0, 0.0, design.shape[0], 1))
    rest = float(rows[:, 1:].var(0, ddof=1).mean()) / (seeds - 1)
    between = float(design.scores(d, weights).var(ddof=1)) / seeds
    return Estimate(mean, Spread(over_images, between, rest, design.shape[0], seeds))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment (1979): compared with alpha, they hold the chance of any false call at alpha."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def correlations(table: Array) -> tuple[Array, list[int]]:
    """Of scores arms x groups [A, G]: Pearson's correlations [G, G], and an order that puts similar groups together.

    A group whose score is the same in every arm has no correlation (nan) and keeps its place at the end.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    varied = [index for index in range(table.shape[1]) if np.ptp(table[:, index]) > 0]
    matrix = np.full((table.shape[1],) * 2, np.nan)
    if len(varied) > 1:
        matrix[np.ix_(varied, varied)] = np.corrcoef(table[:, varied].T)
    order = varied
    if len(varied) > 2:
        distance = squareform(np.clip(1 - matrix[np.ix_(varied, varied)], 0, None), checks=False)
        order = [varied[leaf] for leaf in hierarchy.leaves_list(hierarchy.linkage(distance, "average"))]
    return matrix, order + [index for index in range(table.shape[1]) if index not in varied]


def correlation_interval(r: float, n: int, alpha: float = ALPHA) -> tuple[float, float]:
    """Fisher's interval of a correlation over `n` arms; (-1, 1) below four arms, where nothing can be said."""
    if n < 4 or not np.isfinite(r):
        return -1.0, 1.0
    half = float(stats.norm.isf(alpha / 2)) / np.sqrt(n - 3)
    centre = np.arctanh(np.clip(r, -0.999999, 0.999999))
    return float(np.tanh(centre - half)), float(np.tanh(centre + half))
