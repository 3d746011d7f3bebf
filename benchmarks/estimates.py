"""From samples to figures: percentiles, paired ratios and their intervals. Pure and seeded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]

_RESAMPLES = 4000
_FEWEST = 3
_Z95 = 1.959964
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t, two-sided 95 %, by degrees of freedom from 1 on (NIST/SEMATECH e-Handbook, 1.3.6.7.2)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the interval that holds it with 95 % confidence.

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


def mean_estimate(samples: Sequence[float]) -> Estimate:
    """The mean of independent samples, such as one ratio per start of the servers, with Student's interval.

    Of few samples the bootstrap's is too narrow: of seven by a quarter.
    """
    count = len(samples)
    mean = statistics.fmean(samples) if samples else float("nan")
    if count < _FEWEST:
        return Estimate(mean, float("nan"), float("nan"), count)
    half = _T95[min(count - 1, len(_T95)) - 1] * statistics.stdev(samples) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


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
