"""From samples to figures: percentiles, paired ratios and bootstrap intervals. Pure and seeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]

_RESAMPLES = 4000
_FEWEST = 3
_Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the interval that holds it with 95 % confidence, by bootstrap.

    Of fewer than three samples the interval is NaN, so that no target compares as met by it.
    """

    value: float
    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        if self.samples < _FEWEST:
            return f"{self.value:.3f} (too few samples for an interval)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample at `share` (0 to 1), linearly interpolated; NaN of nothing."""
    return float(np.quantile(samples, share)) if samples else float("nan")


def median(samples: Sequence[float]) -> float:
    return percentile(samples, 0.5)


def median_estimate(samples: Sequence[float], seed: int) -> Estimate:
    """The median of independent samples, such as one ratio per pair of runs."""
    return _bootstrap([samples], lambda drawn: np.median(drawn[0], axis=1), seed)


def mean_estimate(samples: Sequence[float], seed: int) -> Estimate:
    """The mean of independent samples, such as one ratio per start of the servers."""
    return _bootstrap([samples], lambda drawn: drawn[0].mean(axis=1), seed)


def percentile_ratio(over: Sequence[float], under: Sequence[float], share: float, seed: int) -> Estimate:
    """The ratio of two systems' percentiles, each side resampled by itself."""
    return _bootstrap(
        [over, under],
        lambda drawn: np.quantile(drawn[0], share, axis=1) / np.quantile(drawn[1], share, axis=1),
        seed,
    )


def percentile_estimate(samples: Sequence[float], share: float, seed: int) -> Estimate:
    """The sample at `share` (0 to 1) of independent samples."""
    return _bootstrap([samples], lambda drawn: np.quantile(drawn[0], share, axis=1), seed)


def percentile_gap(over: Sequence[float], under: Sequence[float], share: float, seed: int) -> Estimate:
    """By how much one system's percentile exceeds the other's, each side resampled by itself."""
    return _bootstrap(
        [over, under],
        lambda drawn: np.quantile(drawn[0], share, axis=1) - np.quantile(drawn[1], share, axis=1),
        seed,
    )


def share_estimate(hits: int, trials: int) -> Estimate:
    """The share of independent trials that hit, with Wilson's score interval.

    Wilson (1927). Unlike the bootstrap it does not shrink to nothing where every trial hit.
    """
    if trials == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    share, z2 = hits / trials, _Z95 * _Z95
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(share, low, high, trials)


def _bootstrap(
    groups: Sequence[Sequence[float]], figure: Callable[[list[Samples]], Samples], seed: int
) -> Estimate:
    """Percentile bootstrap of `figure`, which maps one (resamples, n) array per group to n figures."""
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    count = min(len(array) for array in arrays)
    if count == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(seed)
    drawn = [array[rng.integers(0, len(array), (_RESAMPLES, len(array)))] for array in arrays]
    low, high = np.quantile(figure(drawn), (0.025, 0.975)) if count >= _FEWEST else (np.nan, np.nan)
    value = figure([array[np.newaxis, :] for array in arrays])[0]
    return Estimate(float(value), float(low), float(high), count)
