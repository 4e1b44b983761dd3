"""Surfaces of operators, and the correction of whole networks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.latency.fit import KINDS, Surfaces, fit_correction, fit_factors, fit_surface, held_out_error


def test_a_staircase_is_predicted_between_the_measured_points() -> None:
    def truth(c_in: np.ndarray, c_out: np.ndarray) -> np.ndarray:
        return 0.01 + 0.002 * np.ceil(c_in / 16) * np.ceil(c_out / 16)

    points = np.asarray([(a, b) for a in (16, 64, 128, 192, 256) for b in (16, 64, 128, 192, 256)])
    surface = fit_surface(points[:, 0], points[:, 1], truth(points[:, 0], points[:, 1]), block=16)
    asked = np.asarray([(a, b) for a in range(16, 257, 16) for b in range(16, 257, 16)])
    predicted = Surfaces([surface], 16)(asked[:, :1], asked[:, 1:])[:, 0]
    assert np.abs(predicted / truth(asked[:, 0], asked[:, 1]) - 1).max() < 0.02
    assert surface.covers((16, 256), (20, 30))
    assert not surface.covers((8, 256), (20, 30))


def test_the_slower_kernel_of_misfit_channels_is_predicted() -> None:
    rng = np.random.default_rng(0)

    def truth(c_in: np.ndarray, c_out: np.ndarray) -> np.ndarray:
        slower = np.where(c_in % 4 == 0, 1.0, 2.5)
        return 0.005 + 0.002 * slower * np.ceil(c_in / 16) * np.ceil(c_out / 16)

    c_in, c_out = rng.integers(16, 65, 60), rng.integers(4, 17, 60) * 4
    surface = Surfaces([fit_surface(c_in, c_out, truth(c_in, c_out), block=16)], 16)
    asked_in, asked_out = rng.integers(16, 65, 200), rng.integers(4, 17, 200) * 4
    predicted = surface(asked_in[:, None], asked_out[:, None])[:, 0]
    assert np.abs(predicted / truth(asked_in, asked_out) - 1).mean() < 0.10


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_surfaces_of_noise_are_positive(seed: int) -> None:
    rng = np.random.default_rng(seed)
    c_in, c_out, ms = rng.integers(1, 100, 12), rng.integers(1, 100, 12), rng.uniform(0.001, 10, 12)
    surface = Surfaces([fit_surface(c_in, c_out, ms, block=8)], 8)
    asked = rng.integers(1, 120, (2, 50, 1))
    assert (surface(asked[0], asked[1]) > 0).all()


def test_the_correction_finds_a_line() -> None:
    totals = np.linspace(1, 10, 20)
    correction = fit_correction(totals, np.full(20, 7.0), 0.3 + 0.8 * totals)
    assert correction.offset == pytest.approx(0.3)
    assert correction.slope == pytest.approx(0.8)
    assert correction.weights == ()
    assert float(fit_correction([2.0], [9.0], [3.0])(4.0, 9.0)) == pytest.approx(6.0)
    falling = fit_correction([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert falling.slope > 0


def test_the_correction_sees_that_many_weights_leave_the_nearest_cache() -> None:
    rng = np.random.default_rng(3)
    totals, weights = rng.uniform(0.2, 1.0, 80), rng.uniform(0.0, 1e7, 80)

    def truth(total: np.ndarray, size: np.ndarray) -> np.ndarray:
        return 0.02 + total + 0.4 * np.clip((size - 1.6e6) / 4.8e6, 0.0, 1.0)

    correction = fit_correction(totals, weights, truth(totals, weights))
    unseen, sizes = rng.uniform(0.2, 1.0, 200), rng.uniform(0.0, 1e7, 200)
    off = np.abs(correction(unseen, sizes) / truth(unseen, sizes) - 1)
    by_sum_alone = fit_correction(totals, np.zeros(80), truth(totals, weights))
    assert off.mean() < 0.03
    assert off.mean() < 0.3 * np.abs(by_sum_alone(unseen, 0.0) / truth(unseen, sizes) - 1).mean()
    more = correction(np.full(50, 0.5), np.linspace(0, 2e7, 50))
    assert (np.diff(more) >= 0).all()


def test_each_kind_of_term_gets_its_factor() -> None:
    rng = np.random.default_rng(5)
    parts = rng.uniform(0.5, 2.0, (60, len(set(KINDS))))
    factors = np.asarray([0.0, 0.7, 1.1, 0.6, 1.3, 0.9, 0.8])
    truth = parts @ factors
    found = np.asarray(fit_factors(parts, truth.tolist()))
    assert np.corrcoef(found, factors)[0, 1] > 0.95  # drawn to one another, yet in the right order
    alike = parts.sum(axis=1) * float(np.median(truth / parts.sum(axis=1)))
    assert np.abs(parts @ found / truth - 1).mean() < 0.5 * np.abs(alike / truth - 1).mean()
    assert fit_factors(parts, (3.0 * parts.sum(axis=1)).tolist()) == pytest.approx([3.0] * len(factors))
    assert fit_factors(parts[:5], [1.0] * 5) == ()


def test_a_few_slowed_networks_do_not_bend_the_correction() -> None:
    rng = np.random.default_rng(8)
    totals = rng.uniform(0.2, 1.0, 60)
    truth = 0.05 + 1.1 * totals
    slowed = np.where(np.arange(60) % 5 == 0, 1.4, 1.0) * truth
    correction = fit_correction(totals, np.full(60, 7.0), slowed)
    assert np.abs(correction(totals, 7.0) / truth - 1).max() < 0.04


def test_factors_scale_terms_of_their_kind_only() -> None:
    rng = np.random.default_rng(6)
    c_in, c_out = rng.integers(1, 100, 40), rng.integers(1, 100, 40)
    fitted = fit_surface(c_in, c_out, 0.1 + 0.01 * c_in + 0.002 * c_in * c_out, block=8)
    asked = rng.integers(8, 100, (2, 30, 1))
    parts = Surfaces([fitted], 8).by_kind(*asked)
    assert parts.sum(axis=1) == pytest.approx(Surfaces([fitted], 8)(*asked)[:, 0])
    doubled = Surfaces([fitted], 8, [1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0])
    assert doubled(*asked)[:, 0] == pytest.approx(parts.sum(axis=1) + parts[:, 4])


def test_held_out_error_by_hand() -> None:
    error = held_out_error([1.1, 1.8, 3.0], [1.0, 2.0, 3.0])
    assert error.mape == pytest.approx(0.2 / 3)
    assert error.worst == pytest.approx(0.1)
    assert error.bias == pytest.approx(0.0)
    assert error.spearman == 1.0
    assert held_out_error([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]).spearman == pytest.approx(-1.0)
    assert held_out_error([1.0, 1.0], [1.0, 2.0]).spearman == 1.0
