"""From load to capacity: steps follow from what streams were served, and the fit finds the machine again."""

from __future__ import annotations

import datetime
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.capacity import Level, Limits, NodeEngine, levels, main, parse
from benchmarks.capacity_fit import Point, fit, offers, point, prefill_tok_s
from benchmarks.capacity_report import Measured, report, table, write
from benchmarks.load import Phase, RequestRecord, Served
from contract.capacity import NodeCapacity, Promise, judge, parse_capacity
from contract.step_time import StepTime

MACHINE = StepTime(base_s=0.004, prefill_token_s=2e-5, decode_s=1e-4, kv_token_s=1e-7)
CAPACITY = NodeCapacity(
    model_id="m",
    base_s=0.004,
    prefill_token_s=2e-5,
    decode_s=1e-4,
    kv_token_s=1e-7,
    slots=64,
    kv_tokens=1_000_000,
    error=0.01,
    measured_at=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
)
PROMISE = Promise(0.0, 100_000, 1_000.0)


def stream(first_s: float, last_s: float, tokens: int, prompt: int = 32) -> RequestRecord:
    return RequestRecord(
        *("seat", 0.0, 0.0, prompt, tokens),
        first_token_s=first_s,
        last_token_s=last_s,
        output_tokens=tokens,
    )


def exact(machine: StepTime, streams: int, context: int, prefill: float = 0.0) -> Point:
    """A level that took just what the machine takes."""
    kv = streams * context
    return Point(f"{streams}", streams, kv, prefill, machine.seconds(prefill, streams, kv))


# --- a level -----------------------------------------------------------------------------------------


def test_a_step_gives_each_stream_a_token() -> None:
    # Two streams all through a window of 10 s, and one in half of it: 2.5 streams, 100 tokens/s for each.
    records = [stream(1, 15, 1401), stream(1, 15, 1401), stream(10, 20, 1001)]
    phase = Phase(5.0, 15.0, {"seat": Served(0, 2500)}, records)
    found = point("level", phase, "seat")
    assert found.streams == pytest.approx(2.5)
    assert found.step_s == pytest.approx(0.01)
    assert found.stream_tok_s == pytest.approx(100)
    assert found.total_tok_s == pytest.approx(250)


def test_the_context_is_that_of_the_window_and_grows_with_the_answer() -> None:
    phase = Phase(5.0, 15.0, {"seat": Served(0, 1000)}, [stream(1, 15, 1401, prompt=500)])
    # 400 tokens at its start, 1,400 at its end.
    assert point("level", phase, "seat").kv_tokens == pytest.approx(500 + 1 + 900)


def test_prompts_within_the_window_are_told_by_the_step() -> None:
    phase = Phase(0.0, 10.0, {"seat": Served(2_000, 1_000)}, [stream(0, 10, 1_001)])
    assert point("level", phase, "seat").prefill_tokens == pytest.approx(2.0)


def test_a_level_without_a_token_is_told() -> None:
    with pytest.raises(ValueError, match="no stream made tokens"):
        point("level", Phase(0.0, 10.0, {"seat": Served(0, 0)}, []), "seat")


def test_the_prefill_rate_is_taken_between_prompts_and_not_from_the_windows_ends() -> None:
    records = [stream(at, at, 1, prompt=4_000) for at in (0.5, 2.0, 4.0, 6.0, 9.5)]
    assert prefill_tok_s(Phase(1.0, 9.0, {}, records)) == pytest.approx(8_000 / 4)
    with pytest.raises(ValueError, match="fewer than two prompts"):
        prefill_tok_s(Phase(1.0, 3.0, {}, records))


# --- the fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "machine",
    [
        MACHINE,
        replace(MACHINE, decode_s=0.0),
        replace(MACHINE, kv_token_s=0.0, base_s=0.0),
        replace(MACHINE, experts_s=0.02, active_share=8 / 128),
    ],
)
def test_the_fit_finds_the_machine_that_was_measured(machine: StepTime) -> None:
    plan = [(n, 700) for n in (1, 2, 4, 8, 16, 32, 64)] + [(1, 4_000), (16, 3_000), (64, 2_500)]
    points = [exact(machine, *each, prefill=0.5) for each in plan]
    found, error = fit(points, 1 / machine.prefill_token_s, machine.active_share)
    assert error < 1e-6
    for name in ("base_s", "prefill_token_s", "decode_s", "kv_token_s", "experts_s"):
        assert getattr(found, name) == pytest.approx(getattr(machine, name), abs=1e-9), name


def test_no_constant_is_negative_whatever_was_measured() -> None:
    """Steps that become shorter with more streams are noise, and no machine."""
    points = [Point("", n, 100 * n, 0.0, 0.02 - n / 10_000) for n in (1, 2, 4, 8, 16, 32)]
    found, error = fit(points, 50_000)
    assert min(found.base_s, found.decode_s, found.kv_token_s, found.experts_s) == 0.0
    assert found.base_s == pytest.approx(0.0189, rel=0.05)
    assert 0 < error < 0.1


# --- what is told ------------------------------------------------------------------------------------


def test_levels_double_up_to_all_slots_and_fit_into_the_kv_cache() -> None:
    limits = Limits(slots=48, kv_tokens=40_000, context_tokens=8_192, step_tokens=2_048)
    plan = levels(limits)
    assert [each.streams for each in plan if each.prompt_tokens == 32] == [1, 2, 4, 8, 16, 32, 48]
    long = [each for each in plan if each.prompt_tokens > 32]
    assert [each.prompt_tokens for each in long] == [2_048] * 3
    assert all(each.streams * each.prompt_tokens <= limits.kv_tokens for each in plan)
    assert levels(Limits(1, 2_000, 500, None))[0] == Level(1, 32)


def test_offers_agree_with_the_check_that_the_control_plane_makes() -> None:
    found = offers(CAPACITY, PROMISE)
    assert found[0].streams == 64
    for before, after in itertools.pairwise(found):
        assert after.streams <= before.streams
        assert after.seats <= before.seats
    for offer in found:
        promise = replace(PROMISE, guarantee_tok_s=offer.guarantee_tok_s)
        assert judge(CAPACITY, promise, offer.seats).fits
        assert not judge(CAPACITY, promise, offer.seats + 1).fits
        # Each stream has its pace, and one more would break it.
        assert offer.total_tok_s >= offer.streams * offer.guarantee_tok_s * 0.999
        assert offer.seats <= offer.streams


def test_what_is_written_is_what_a_pool_and_an_agent_take(tmp_path: Path) -> None:
    points = (exact(MACHINE, 1, 600), exact(MACHINE, 64, 600))
    measured = Measured(CAPACITY, PROMISE, points, tuple(offers(CAPACITY, PROMISE)), 50_000.0)
    written = write(measured, tmp_path)
    assert {path.name for path in written} == {"capacity.json", "measured.json", "table.txt", "capacity.png"}
    assert all(path.stat().st_size for path in written)
    assert parse_capacity((tmp_path / "capacity.json").read_bytes()) == CAPACITY
    assert "guarantee tok/s  streams at this pace  best total tok/s  seats to sell" in report(measured)


def test_columns_are_aligned() -> None:
    assert table(("a", "b"), [("long", "1"), ("x", "100")]) == "a       b\nlong    1\nx     100"


def test_engine_flags_go_to_the_engine_as_they_are() -> None:
    """A pool without any runs what vLLM takes by default."""
    flags = ["--max-num-seqs", "256", "--enforce-eager"]
    options = parse(["--model", "m", "--", *flags])
    assert (options.max_num_seqs, options.engine_flags) == (256, flags)
    options = parse(["--model", "m"])
    assert (options.max_num_seqs, options.engine_flags) == (None, [])
    for given in ([], flags):
        assert NodeEngine("m", extra=tuple(given)).flags() == ["--disable-uvicorn-access-log", *given]
    for wrong in (["--level-s", "0"], ["--margin", "1"], ["--", "--max-num-seqs", "0"]):
        with pytest.raises(SystemExit):
            parse(["--model", "m", *wrong])


@pytest.mark.slow
def test_an_engine_that_does_not_start_is_told_with_the_end_of_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "ended with status" in capsys.readouterr().err
