"""Statistics of sweeps: against closed forms and scipy, calibrated over simulated sweeps; verdicts on known cases."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from vlm_lab import verdict
from vlm_lab.stats import (
    RESAMPLES,
    Design,
    Estimate,
    Spread,
    compare,
    correlation_interval,
    correlations,
    holm,
    over_seeds,
)
from vlm_lab.verdict import judge, judge_equal, worst

SWEEPS, SEEDS, IMAGES, PER_IMAGE, CELLS = 1000, 3, 100, 2, 4
EVEN = np.full(CELLS, 1 / CELLS)


def design(images: int = IMAGES, per_image: int = PER_IMAGE, cells: int = CELLS) -> Design:
    return Design(np.arange(images * per_image) % cells, np.repeat(np.arange(images), per_image))


def simulate(shift: float, seed: int, sweeps: int = SWEEPS) -> tuple[list[Estimate], float]:
    """Sweeps of two arms whose answers differ by `shift` logits, with chance per seed, per image, and per answer.

    Returns every sweep's estimate of the difference and its true value in points.
    """
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 1.2, (sweeps, 1, IMAGES))

    def chances(shift: float) -> np.ndarray:
        logit = shift + difficulty + rng.normal(0, 0.2, (sweeps, SEEDS, 1)) + rng.normal(0, 0.7, (sweeps, 1, IMAGES))
        return np.repeat(1 / (1 + np.exp(-logit)), PER_IMAGE, axis=2)  # [sweeps, seeds, questions]

    left, right = chances(shift), chances(0.0)
    drawn = [100.0 * (rng.random(p.shape) < p) for p in (left, right)]
    return [compare(a, b, design(), EVEN) for a, b in zip(*drawn, strict=True)], 100 * float((left - right).mean())


def covers(e: Estimate, value: float) -> bool:
    low, high = e.interval()
    return low <= value <= high


def test_a_null_effect_is_called_at_the_nominal_rate() -> None:
    """5 % of 1,000 null sweeps, within three binomial standard errors (2.9 to 7.1 %), as many up as down."""
    estimates, _ = simulate(0.0, seed=1)
    called = [e for e in estimates if e.p < 0.05]
    assert 0.029 < len(called) / SWEEPS < 0.071
    assert 0.25 < np.mean([e.mean > 0 for e in called]) < 0.75
    assert np.mean([covers(e, 0.0) for e in estimates]) == pytest.approx(1 - len(called) / SWEEPS)
    verdicts = [judge(e, e.p, None).verdict for e in estimates[:100]]
    assert verdicts.count("underpowered") == sum(e.p >= 0.05 for e in estimates[:100])


@pytest.mark.parametrize("shift", [0.45, 0.8])
def test_a_planted_effect_is_found_at_the_computed_power(shift: float) -> None:
    """The share of sweeps that call it equals the power computed from their mean spread, within 5 points."""
    estimates, truth = simulate(shift, seed=2)
    found = np.mean([e.p < 0.05 and e.mean > 0 for e in estimates])
    parts = np.mean([(e.spread.over_images, e.spread.over_seeds, e.spread.rest) for e in estimates], axis=0)
    computed = Spread(*parts, images=IMAGES, seeds=SEEDS).power(truth)
    assert found == pytest.approx(computed, abs=0.05)
    assert np.mean([e.mean for e in estimates]) == pytest.approx(truth, abs=0.5)
    assert np.mean([covers(e, truth) for e in estimates]) > 0.92


def test_a_reversed_effect_is_contradicted_and_a_planted_one_reproduced() -> None:
    estimates, truth = simulate(2.0, seed=3, sweeps=200)
    planted = [judge(e, e.p, truth).verdict for e in estimates]
    assert planted.count("reproduced") > 190
    assert "contradicted" not in planted
    reversed_ = [judge(Estimate(-e.mean, e.spread), e.p, truth).verdict for e in estimates]
    assert reversed_.count("contradicted") > 195


def test_the_difference_is_the_mean_over_cells_and_its_error_is_clustered() -> None:
    """Unequal cells: the mean of the cells' means, not of the questions. Copies of a question add no information."""
    rng = np.random.default_rng(0)
    cells = np.array([0] * 60 + [1] * 20)
    a, b = (100.0 * (rng.random((SEEDS, 80)) < p) for p in (0.7, 0.4))
    single = Design(cells, np.arange(80))
    weights = np.array([0.5, 0.5])
    got = compare(a, b, single, weights)
    d = (a - b).mean(0)
    assert got.mean == pytest.approx((d[:60].mean() + d[60:].mean()) / 2)
    twice = Design(np.tile(cells, 2), np.tile(np.arange(80), 2))
    doubled = compare(np.tile(a, 2), np.tile(b, 2), twice, weights)
    assert (doubled.mean, doubled.se) == pytest.approx((got.mean, got.se))
    alone = compare(np.tile(a, 2), np.tile(b, 2), Design(twice.cells, np.arange(160)), weights)
    assert alone.se < got.se  # as if the copies were new images


def test_without_chance_between_seeds_the_error_is_that_of_the_mean_over_images() -> None:
    """One seed, one question an image, one cell: the textbook's standard error, to the bootstrap's own 5 %."""
    rng = np.random.default_rng(0)
    a, b = 100.0 * (rng.random((1, 400)) < 0.6), 100.0 * (rng.random((1, 400)) < 0.4)
    got = compare(a, b, Design(np.zeros(400, int), np.arange(400)), np.ones(1))
    assert got.se == pytest.approx(scipy_stats.sem((a - b)[0]), rel=0.05)
    assert (got.seeds, got.df) == (1, 399)


def test_equal_arms_have_no_difference() -> None:
    a = np.full((3, 8), 100.0)
    got = compare(a, a, design(4, 2), EVEN)
    assert (got.mean, got.se, got.p, got.interval()) == (0, 0, 1, (0, 0))
    assert (got.spread.detectable(), got.spread.power(1.0)) == (0, 1)


def test_a_bootstrap_draw_that_misses_a_cell_leaves_its_weight_to_the_others() -> None:
    """Two images, each with a cell of its own: half of the draws miss one; no draw is nan."""
    small = Design(np.array([0, 1]), np.array([0, 1]))
    rows = small.resampled(np.array([[100.0, 0.0]]), np.array([0.5, 0.5]))
    assert rows.shape == (RESAMPLES, 1)
    assert set(np.unique(rows)) == {0.0, 50.0, 100.0}
    one_cell = small.resampled(np.array([[100.0, 0.0]]), np.array([1.0, 0.0]))
    assert len(one_cell) < RESAMPLES  # draws without any question of that cell say nothing
    assert (one_cell == 100.0).all()


def test_power_and_the_detectable_difference_are_inverse() -> None:
    """Against the two-sample formula for many degrees of freedom: (1.96 + 0.84) standard errors."""
    many = Spread(4.0, 0.0, 0.0, images=10**6, seeds=1)
    assert many.detectable() == pytest.approx((1.959964 + 0.841621) * 2.0, rel=1e-3)
    assert many.power(many.detectable()) == pytest.approx(0.8, abs=1e-3)
    assert many.power(0.0) == pytest.approx(0.05, abs=1e-4)


def test_power_over_seeds_is_the_noncentral_t() -> None:
    """Variance over seeds only, two degrees of freedom: scipy's noncentral t, within half a point."""
    few, limit = Spread(0.0, 4.0, 0.0, images=0, seeds=3), scipy_stats.t.isf(0.025, 2)
    exact = scipy_stats.nct.sf(limit, 2, 5.0) + scipy_stats.nct.cdf(-limit, 2, 5.0)
    assert few.power(10.0) == pytest.approx(exact, abs=0.005)
    assert few.power(0.0) == pytest.approx(0.05, abs=0.005)
    assert few.detectable() > 1.5 * 2.8 * 2.0  # three seeds cost


def test_an_arm_has_students_interval_over_seeds() -> None:
    scores = np.array([30.0, 34.0, 32.0])
    low, high = scipy_stats.t.interval(0.95, 2, scores.mean(), scipy_stats.sem(scores))
    got = over_seeds(scores)
    assert (got.mean, *got.interval()) == pytest.approx((32.0, low, high))


def test_holm_on_the_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_correlations_bring_planted_clusters_together() -> None:
    """Groups 0 and 2 rise together over 30 arms, 1 and 3 with each other; group 4 never moves."""
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 30))
    noise = 0.1 * rng.normal(size=(4, 30))
    table = np.stack([one + noise[0], two + noise[1], one + noise[2], two + noise[3], np.full(30, 7.0)], axis=1)
    matrix, order = correlations(table)
    assert matrix[0, 2] > 0.95
    assert matrix[1, 3] > 0.95
    assert np.isnan(matrix[4]).all()
    assert sorted([sorted(order[:2]), sorted(order[2:4])]) == [[0, 2], [1, 3]]
    assert order[4] == 4


def test_the_interval_of_a_correlation_covers_it() -> None:
    """Fisher's: of 1,000 samples of ten arms from a known correlation, 95 % hold it, within 2.5 points."""
    rng, r = np.random.default_rng(0), 0.6
    samples = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], size=(1000, 10))
    intervals = [correlation_interval(np.corrcoef(sample.T)[0, 1], 10) for sample in samples]
    assert np.mean([low <= r <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.025)
    assert correlation_interval(0.9, 3) == (-1.0, 1.0)


def around(mean: float, half: float, seeds: int = 3) -> Estimate:
    """An estimate whose 95 % interval is mean +- half."""
    se = half / float(scipy_stats.t.isf(0.025, 1000))
    return Estimate(mean, Spread(se**2, 0.0, 0.0, images=1001, seeds=seeds))


@pytest.mark.parametrize(
    ("difference", "published", "expected", "reason"),
    [
        (around(5, 2), 4.0, "reproduced", "may be of the published size"),
        (around(5, 2), 20.0, "direction only", "times smaller"),
        (around(9, 2), 1.0, "direction only", "times larger"),
        (around(5, 2), None, "direction only", "no size"),
        (around(-5, 2), 4.0, "contradicted", "the other way round"),
        (around(0.5, 2), 4.0, "contradicted", "published size is excluded"),
        (around(0.5, 5), 4.0, "underpowered", "80 % power"),
        (around(0.5, 2), None, "underpowered", "no significant difference"),
        (around(5, 2, seeds=1), 4.0, "underpowered", "one seed"),
    ],
)
def test_verdicts_of_one_link(difference: Estimate, published: float | None, expected: str, reason: str) -> None:
    got = judge(difference, difference.p, published)
    assert got.verdict == expected
    assert reason in got.reason


@pytest.mark.parametrize(
    ("difference", "expected"),
    [(around(0.2, 1), "reproduced"), (around(0.2, 4), "underpowered"), (around(6, 2), "contradicted")],
)
def test_verdicts_of_equality(difference: Estimate, expected: str) -> None:
    assert judge_equal(difference, margin=2.0).verdict == expected


def test_a_chain_is_as_good_as_its_weakest_link() -> None:
    verdicts = [verdict.Verdict("reproduced", "x"), verdict.Verdict("underpowered", "y")]
    assert worst(verdicts).reason == "y"
