"""Fits the step-time model to the steps of a running engine.

Weighted least squares with forgetting on the five terms of `StepTime`, none below 0. Three things make it
hold on a real machine:

* Rows are relative (divided by the predicted time), so that a long step does not outvote a hundred short
  ones, and a residual far beyond the usual ones counts as its sign only (Huber 1964): a paused process, a
  compilation or a page fault moves nothing.
* What the running batch does not vary cannot be told apart; there the fit keeps to the ratios of its seed.
* A machine that becomes slower as a whole (throttled, shared) is followed within tens of steps by one factor.
* Once `anchor`ed, the terms learn from times with that factor taken out, and remember what they were anchored
  to. A scheduler that makes batches smaller whenever the machine is slow would otherwise teach the fit that
  size does not matter: all its steps take the same time.

Time between steps is not the model's business: the caller passes the time of steps alone. Loops go by index,
of which mypyc (setup.py) makes fast code, and not of `zip` and `map`.
"""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import Final

from contract.step_time import StepTime

_TERMS: Final = 5
_UNITS = (1.0, 100.0, 10.0, 10_000.0, 0.1)
"""Per term a usual size, so that all columns are of one magnitude. Not Final, nor is the next: of such
tuples, mypyc 2.4 says at run time that they were not set."""
_TYPICAL = (1.0, 256.0, 16.0, 8_192.0, 0.5)
"""The step at which the seed weighs as much as the samples that it stands for."""
_SOLVE_EVERY: Final = 16
"""Samples that are learned from at once: the first takes as long as the others together, with nothing of that
in the processor's cache."""
_MEMORY: Final = 2_000
"""Steps after which a sample has lost two thirds of its weight."""
_FADING: Final = [(1.0 - 1.0 / _MEMORY) ** age for age in reversed(range(_SOLVE_EVERY))]
"""What is left of the weight of the last samples, oldest first."""
_SPEED_GAIN: Final = 0.05
_ERROR_GAIN: Final = 0.02
_HUBER: Final = 3.0
_LEAST_SCALE: Final = 0.02
"""Relative residuals below this are never outliers."""


class StepTimeFit:
    """The step time of one engine, learned while it runs.

    Invariants: no term of `model` is negative; `model` is what was last solved for times `speed`; one
    sample changes `speed` by at most `_SPEED_GAIN * _HUBER` usual residuals.
    """

    def __init__(self, seed: StepTime, *, seed_samples: float = 5.0) -> None:
        """`seed_samples`: how many samples the seed counts for; more for the fit of an earlier run."""
        self.model = seed
        self.samples = 0
        self.error = 0.0
        """Mean relative error of the predictions, of late."""
        self.speed = 1.0
        """Measured over fitted time, of late: above 1 while the machine is slower than it used to be."""
        self._active_share = seed.active_share
        self._terms = _scaled(seed)
        self._raw = seed
        self._scales = [0.1, 0.1]
        """Usual relative residuals, of steps without and with a prompt: where prompts are rare, a wrong
        price of theirs must not pass for an outlier."""
        self._rows = [[0.0] * _TERMS for _ in range(_TERMS)]
        self._sums = [0.0] * _TERMS
        self._fresh: list[tuple[float, float, float, float]] = []
        """Samples that nothing was learned from yet: prompt tokens, decodes, KV tokens, seconds."""
        self._prior = [0.0] * _TERMS
        self._prior_sums = [0.0] * _TERMS
        self._anchored = False
        self._believe(seed_samples)

    def anchor(self, samples: float) -> None:
        """What is known now was measured with batches of all sizes: keep to it as to so many samples."""
        self._terms = _scaled(self.model)
        self._raw, self.speed = self.model, 1.0
        self._rows = [[0.0] * _TERMS for _ in range(_TERMS)]
        self._sums = [0.0] * _TERMS
        self._fresh.clear()
        self._believe(samples)
        self._anchored = True

    def _believe(self, samples: float) -> None:
        """Let the present terms count for so many samples of a typical step."""
        usual = _row(self._raw, *_TYPICAL[1:4])
        expected = self._raw.seconds(*_TYPICAL[1:4])
        self._prior = [samples * (x / expected) ** 2 for x in usual]
        self._prior_sums = [weight * term for weight, term in zip(self._prior, self._terms, strict=True)]

    def observe(
        self,
        prefill_tokens: float,
        decodes: float,
        kv_tokens: float,
        seconds: float,
        predicted_s: float,
    ) -> None:
        """One step took `seconds`, and `predicted_s` is what it was chosen by. Steps without work, and
        impossible times, are passed over."""
        if not 0.0 < seconds < 60.0 or prefill_tokens + decodes <= 0:
            return
        residual = abs(seconds / max(1e-6, predicted_s) - 1.0)
        self.error += _ERROR_GAIN * (min(1.0, residual) - self.error)
        self.samples += 1
        self._fresh.append((prefill_tokens, decodes, kv_tokens, seconds))
        if len(self._fresh) == _SOLVE_EVERY:
            self._take_in()
            self._solve()

    def _weigh(
        self, prefill_tokens: float, decodes: float, kv_tokens: float, seconds: float
    ) -> tuple[list[float], float, float]:
        """Follow the machine's speed by one sample; its terms, the seconds to learn from, its weight."""
        row = _row(self._raw, prefill_tokens, decodes, kv_tokens)
        fitted = max(1e-6, _dot(self._terms, row))
        residual = seconds / (fitted * self.speed) - 1.0
        kind = int(prefill_tokens > 0)
        limit = _HUBER * self._scales[kind]
        clipped = max(-limit, min(limit, residual))
        self._scales[kind] = max(
            _LEAST_SCALE, self._scales[kind] + 0.05 * (abs(clipped) - self._scales[kind])
        )
        self.speed *= 1.0 + _SPEED_GAIN * clipped
        # The clipped time, not the measured one: an outlier pulls by its sign, not by its size.
        seen_s = fitted * (1.0 + clipped) * (1.0 if self._anchored else self.speed)
        return row, seen_s, 1.0 / (fitted * fitted)

    def _take_in(self) -> None:
        """Let the sums fade, and add the fresh samples."""
        kept = _FADING[0] * (1.0 - 1.0 / _MEMORY)
        columns: list[list[float]] = [[] for _ in range(_TERMS)]
        seconds: list[float] = []
        faded: list[float] = []
        for k in range(_SOLVE_EVERY):
            row, seen_s, weight = self._weigh(*self._fresh[k])
            for i in range(_TERMS):
                columns[i].append(row[i])
            seconds.append(seen_s)
            faded.append(weight * _FADING[k])
        self._fresh.clear()
        for i in range(_TERMS):
            weighted = [columns[i][k] * faded[k] for k in range(_SOLVE_EVERY)]
            line = self._rows[i]
            for j in range(i, _TERMS):
                line[j] = line[j] * kept + _dot(weighted, columns[j])
            self._sums[i] = self._sums[i] * kept + _dot(weighted, seconds)

    def _solve(self) -> None:
        free = [i for i in range(_TERMS) if self._prior[i] > 0.0]
        terms = [0.0] * _TERMS
        while free:
            solved = _solve_linear(
                [[self._entry(i, j) for j in free] for i in free],
                [self._sums[i] + self._prior_sums[i] for i in free],
            )
            # A term that comes out negative is 0, and the others are solved again without it.
            lowest = min(range(len(free)), key=lambda k: solved[k])
            if solved[lowest] >= 0.0:
                for i, value in zip(free, solved, strict=True):
                    terms[i] = value
                break
            del free[lowest]
        if not any(terms):
            return
        # The terms have taken up part of what the factor followed.
        usual = self._usual()
        before, after = (_dot(each, usual) for each in (self._terms, terms))
        if before > 0.0 and after > 0.0:
            self.speed = min(10.0, max(0.1, self.speed * before / after))
        self._terms = terms
        self._raw = self._model(1.0)
        self.model = self._model(self.speed)

    def _usual(self) -> list[float]:
        """The mean step of late."""
        count = max(1e-9, self._rows[0][0])
        return [self._rows[0][j] / count for j in range(_TERMS)]

    def _entry(self, i: int, j: int) -> float:
        value = self._rows[min(i, j)][max(i, j)]
        return value + self._prior[i] if i == j else value

    def _model(self, speed: float) -> StepTime:
        base, prefill, decode, kv, experts = (
            speed * term / unit for term, unit in zip(self._terms, _UNITS, strict=True)
        )
        return StepTime(base, prefill, decode, kv, experts, self._active_share)


def _scaled(model: StepTime) -> list[float]:
    return [value * unit for value, unit in zip(astuple(model)[:_TERMS], _UNITS, strict=True)]


def _row(model: StepTime, prefill_tokens: float, decodes: float, kv_tokens: float) -> list[float]:
    units = _UNITS
    return [
        1.0,
        prefill_tokens / units[1],
        decodes / units[2],
        kv_tokens / units[3],
        model.touched(decodes) / units[4] if model.active_share else 0.0,
    ]


def _dot(left: list[float], right: list[float]) -> float:
    total = 0.0
    for i in range(len(left)):
        total += left[i] * right[i]
    return total


def _solve_linear(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination with pivots; `matrix` is symmetric and positive definite."""
    size = len(right)
    for i in range(size):
        pivot = i
        for k in range(i + 1, size):
            if abs(matrix[k][i]) > abs(matrix[pivot][i]):
                pivot = k
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        right[i], right[pivot] = right[pivot], right[i]
        line = matrix[i]
        for k in range(i + 1, size):
            other = matrix[k]
            factor = other[i] / line[i]
            for j in range(i, size):
                other[j] -= factor * line[j]
            right[k] -= factor * right[i]
    solved = [0.0] * size
    for i in range(size - 1, -1, -1):
        rest = math.fsum(matrix[i][j] * solved[j] for j in range(i + 1, size))
        solved[i] = (right[i] - rest) / matrix[i][i]
    return solved
