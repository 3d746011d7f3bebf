"""Rules of the step-time fit: what it learns, what it does not fall for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.step_time import StepTime
from scheduler.step_time import StepTimeFit
from serving.step_table import TRUSTED_SAMPLES

GUESS = StepTime(base_s=5e-3, prefill_token_s=50e-6, decode_s=50e-6, kv_token_s=10e-9)
DENSE = StepTime(base_s=3e-3, prefill_token_s=20e-6, decode_s=120e-6, kv_token_s=30e-9)
MIXTURE = StepTime(4e-3, 30e-6, 80e-6, 20e-9, experts_s=12e-3, active_share=8 / 128)
MIXTURE_GUESS = StepTime(5e-3, 50e-6, 50e-6, 10e-9, experts_s=5e-3, active_share=8 / 128)

Step = tuple[int, int, int]


def varied(rng: random.Random) -> Step:
    """Prompt tokens, decodes and KV tokens of a step of a busy engine."""
    decodes = rng.choice((1, 2, 4, 8, 16, 32, 64, rng.randint(1, 128)))
    prefill = rng.choice((0, 0, 0, rng.randint(1, 64), rng.randint(64, 2_048)))
    return prefill, decodes, decodes * rng.randint(50, 2_000)


def decoding(rng: random.Random) -> Step:
    """Of an engine with a steady batch: sixteen decodes and nothing else."""
    return 0, 16, 16 * 500


def steps(
    machine: StepTime, count: int, *, noise: float = 0.1, what: Callable[[random.Random], Step] = varied
) -> Iterator[tuple[int, int, int, float]]:
    rng = random.Random(7)
    for _ in range(count):
        step = what(rng)
        # Of mean 1.
        yield *step, machine.seconds(*step) * rng.lognormvariate(-noise * noise / 2, noise)


def observe(
    fit: StepTimeFit, prefill_tokens: float, decodes: float, kv_tokens: float, seconds: float
) -> None:
    """A step that was chosen by what the fit says at present."""
    predicted_s = fit.model.seconds(prefill_tokens, decodes, kv_tokens)
    fit.observe(prefill_tokens, decodes, kv_tokens, seconds, predicted_s)


def taught(fit: StepTimeFit, *args: object, **options: object) -> StepTimeFit:
    for step in steps(*args, **options):  # type: ignore[arg-type]
        observe(fit, *step)
    return fit


PROBES = ((0, 1, 500), (0, 16, 8_000), (0, 64, 64_000), (512, 16, 16_000), (2_048, 4, 4_000))


def worst(fit: StepTimeFit, machine: StepTime) -> float:
    """The largest relative error over steps of many kinds."""
    return max(abs(fit.model.seconds(*probe) / machine.seconds(*probe) - 1.0) for probe in PROBES)


@pytest.mark.parametrize(
    ("machine", "guess"), [(DENSE, GUESS), (MIXTURE, MIXTURE_GUESS)], ids=["dense", "mixture"]
)
def test_the_machine_is_learned_from_noisy_steps(machine: StepTime, guess: StepTime) -> None:
    fit = StepTimeFit(guess)
    assert worst(fit, machine) > 0.3
    taught(fit, machine, 2_000)
    assert worst(fit, machine) < 0.07


def test_the_constants_themselves_come_out() -> None:
    fit = taught(StepTimeFit(GUESS), DENSE, 4_000, noise=0.05)
    assert fit.model.base_s == pytest.approx(DENSE.base_s, rel=0.1)
    assert fit.model.prefill_token_s == pytest.approx(DENSE.prefill_token_s, rel=0.1)
    assert fit.model.decode_s == pytest.approx(DENSE.decode_s, rel=0.15)


def test_a_hundred_steps_are_enough_for_a_rough_idea() -> None:
    assert worst(taught(StepTimeFit(GUESS), DENSE, 150), DENSE) < 0.2


def test_a_dense_model_is_given_no_experts() -> None:
    fit = taught(StepTimeFit(GUESS), DENSE, 500)
    assert fit.model.experts_s == 0.0
    assert fit.model.active_share == 0.0


@pytest.mark.parametrize("share", [0.01, 0.02])
def test_outliers_move_nothing(share: float) -> None:
    fit = taught(StepTimeFit(GUESS), DENSE, 1_000)
    rng = random.Random(3)
    for prefill, decodes, kv_tokens, seconds in steps(DENSE, 2_000):
        observe(fit, prefill, decodes, kv_tokens, seconds * (20.0 if rng.random() < share else 1.0))
        assert worst(fit, DENSE) < 0.13
    assert worst(fit, DENSE) < 0.08


def test_one_pause_moves_next_to_nothing() -> None:
    fit = taught(StepTimeFit(GUESS), DENSE, 1_000)
    before = fit.model.seconds(0, 16, 8_000)
    observe(fit, 0, 16, 8_000, 50.0)
    for step in steps(DENSE, 20):
        observe(fit, *step)
    assert fit.model.seconds(0, 16, 8_000) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("what", [varied, decoding])
def test_a_machine_that_changes_its_speed_is_followed(
    factor: float, what: Callable[[random.Random], Step], anchored: bool
) -> None:
    fit = taught(StepTimeFit(GUESS), DENSE, 2_000)
    if anchored:
        fit.anchor(TRUSTED_SAMPLES)
    changed = StepTime(*(factor * value for value in astuple(DENSE)[:5]))
    taught(fit, changed, 64, what=what)
    for probe in PROBES:
        assert fit.model.seconds(*probe) == pytest.approx(changed.seconds(*probe), rel=0.25)
    taught(fit, DENSE, 64, what=what)
    for probe in PROBES:
        assert fit.model.seconds(*probe) == pytest.approx(DENSE.seconds(*probe), rel=0.25)


def test_terms_that_the_load_does_not_vary_keep_their_ratio() -> None:
    """A steady batch tells how long its step takes, and not why: the rest is as in the seed."""
    fit = taught(
        StepTimeFit(DENSE, seed_samples=50.0), StepTime(6e-3, 40e-6, 240e-6, 60e-9), 2_000, what=decoding
    )
    doubled = StepTime(*(2.0 * value for value in astuple(DENSE)[:5]))
    assert fit.model.seconds(0, 16, 8_000) == pytest.approx(doubled.seconds(0, 16, 8_000), rel=0.03)
    for probe in ((0, 32, 16_000), (0, 8, 4_000)):
        assert fit.model.seconds(*probe) == pytest.approx(doubled.seconds(*probe), rel=0.25)


def test_an_anchored_fit_does_not_unlearn_from_batches_that_follow_the_machine() -> None:
    """The step scheduler makes the batch smaller whenever the machine is slow, so all steps take the same
    time; a fit that learned from these alone would find that size does not matter."""
    fit = taught(StepTimeFit(GUESS), DENSE, 2_000)
    fit.anchor(TRUSTED_SAMPLES)
    rng = random.Random(5)
    slow = 1.0
    for number in range(6_000):
        if number % 200 == 0:
            slow = rng.choice((0.7, 1.0, 1.4))
        decodes = max(1, round((9e-3 / slow - DENSE.base_s) / (DENSE.decode_s + 500 * DENSE.kv_token_s)))
        observe(fit, 0, decodes, 500 * decodes, slow * DENSE.seconds(0, decodes, 500 * decodes))
    grown = fit.model.seconds(0, 64, 32_000) / fit.model.seconds(0, 1, 500)
    assert grown >= 0.75 * DENSE.seconds(0, 64, 32_000) / DENSE.seconds(0, 1, 500)


def test_an_anchor_changes_no_prediction() -> None:
    fit = taught(StepTimeFit(GUESS), DENSE, 777)
    before = fit.model
    fit.anchor(100.0)
    assert fit.model == before
    observe(fit, 0, 16, 8_000, DENSE.seconds(0, 16, 8_000))
    assert fit.model == before


def test_a_trusted_seed_is_slow_to_move_and_a_guess_is_quick() -> None:
    def moved(samples: float) -> float:
        fit = StepTimeFit(GUESS, seed_samples=samples)
        for step in steps(DENSE, 64):
            observe(fit, *step)
        return abs(fit.model.prefill_token_s / fit.speed - GUESS.prefill_token_s)

    assert moved(10_000.0) < 0.5 * moved(1.0)


@pytest.mark.parametrize(
    "step",
    [
        *((0, 16, 8_000, seconds) for seconds in (0.0, -1.0, 60.0, 1e9, math.inf, -math.inf, math.nan)),
        (0, 0, 0, 5e-3),
        (0, 0, 100, 5e-3),
    ],
)
def test_impossible_steps_are_passed_over(step: tuple[float, float, float, float]) -> None:
    fits = [StepTimeFit(GUESS) for _ in range(2)]
    for number, good in enumerate(steps(DENSE, 100)):
        for fit in fits:
            observe(fit, *good)
        if number % 10 == 0:
            observe(fits[0], *step)
        with_it, without = ((fit.model, fit.samples, fit.speed, fit.error) for fit in fits)
        assert with_it == without


def test_the_error_is_the_mean_relative_error_of_late() -> None:
    quiet = taught(StepTimeFit(GUESS), DENSE, 2_000, noise=0.02)
    noisy = taught(StepTimeFit(GUESS), DENSE, 2_000, noise=0.2)
    # The mean of |noise| is 0.8 of its standard deviation.
    assert quiet.error == pytest.approx(0.8 * 0.02, abs=0.01)
    assert noisy.error == pytest.approx(0.8 * 0.2, abs=0.05)


def test_the_error_is_of_what_steps_were_chosen_by() -> None:
    """By the time that a step is learned from, the fit has followed the steps before it."""
    fit = taught(StepTimeFit(GUESS), DENSE, 1_000)
    for prefill, decodes, kv_tokens, seconds in steps(DENSE, 300):
        fit.observe(prefill, decodes, kv_tokens, seconds, 1.5 * seconds)
    assert fit.error == pytest.approx(1 / 3, abs=0.02)


def test_the_error_grows_when_the_machine_is_another() -> None:
    fit = taught(StepTimeFit(GUESS), DENSE, 2_000, noise=0.02)
    before = fit.error
    taught(fit, StepTime(9e-3, 10e-6, 20e-6, 5e-9), 20, noise=0.02)
    assert fit.error > 3 * before


numbers = st.one_of(st.integers(0, 10_000).map(float), st.floats(0, 1e6))


@settings(max_examples=150)
@given(
    seed=st.builds(
        StepTime,
        st.floats(1e-6, 1.0),
        st.floats(0, 1e-2),
        st.floats(0, 1e-2),
        st.floats(0, 1e-5),
        st.floats(0, 1.0),
        st.sampled_from((0.0, 0.05, 0.5, 1.0)),
    ),
    observed=st.lists(st.tuples(numbers, numbers, numbers, st.floats(allow_nan=True)), max_size=30),
    repeats=st.integers(1, 8),
    anchored=st.booleans(),
)
def test_no_input_makes_a_term_negative_or_no_number(
    seed: StepTime, observed: list[tuple[float, float, float, float]], repeats: int, anchored: bool
) -> None:
    fit = StepTimeFit(seed)
    for repeat in range(repeats):
        for step in observed:
            observe(fit, *step)
        if anchored and repeat == 1:
            fit.anchor(100.0)
        terms = astuple(fit.model)
        assert all(math.isfinite(value) and value >= 0.0 for value in terms)
        assert fit.model.active_share == seed.active_share
        assert 0.0 < fit.speed < math.inf
        assert 0.0 <= fit.error <= 1.0
        assert fit.model.seconds(100, 10, 1_000) > 0.0
