"""What the guarantee scenario makes of its data: each row's target can be met and can be missed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import gpu, guarantee, main
from benchmarks.completions import Target
from benchmarks.estimates import percentile_gap, share_estimate
from benchmarks.guarantee import isolation, pace, returning, shares, step_time, suites, totals
from benchmarks.guarantee.bench import Bench, LedgerReading, NothingServedError, Row, Rows, some
from benchmarks.guarantee.config import Config
from benchmarks.guarantee.counters import Histogram, counter
from benchmarks.guarantee.run import expected_s, sessions, warm_up
from benchmarks.guarantee.windows import attained_by_reading, delivered_by_window
from benchmarks.load import RequestRecord, Sample, Served
from benchmarks.report import PLAIN, SEATS, write
from benchmarks.servers import ServerStartError

_CONFIG = asdict(Config("model", Path(), starts=1))
_CLEAN = {
    "window_s": 10.0,
    "total_tok_s": 1000.0,
    "errors": 0,
    "first_error": None,
    "max_lag_s": 0.0,
    "generator_cores": 0.2,
    "other_cores": 0.02,
    "idle_server_cores": 0.0,
}


def _stream(timeline: list[tuple[float, int]], finished_s: float) -> RequestRecord:
    record = RequestRecord("owed", due_s=0.0, sent_s=0.0, input_tokens=1, max_tokens=1000)
    record.timeline, record.first_token_s, record.finished_s = timeline, timeline[0][0], finished_s
    return record


# --- windows ------------------------------------------------------------------------------------------


def test_windows_are_whole_seconds_from_the_first_token() -> None:
    steady = _stream([(0.5 + 0.1 * step, 1 + step) for step in range(28)], finished_s=3.2)
    assert delivered_by_window(steady, 0.0, 10.0) == [10, 10]


def test_windows_begin_with_the_measurement_and_end_with_it() -> None:
    steady = _stream([(0.1 * step, 1 + step) for step in range(100)], finished_s=10.0)
    assert len(delivered_by_window(steady, 2.05, 6.2)) == 4


def test_a_stream_that_stands_still_is_a_window_without_tokens() -> None:
    stalled = _stream([(0.0, 1), (0.5, 6), (3.5, 7)], finished_s=4.0)
    assert delivered_by_window(stalled, 0.0, 10.0) == [5, 0, 0, 1]


def test_a_stream_without_a_token_has_no_window() -> None:
    waiting = RequestRecord("owed", due_s=0.0, sent_s=0.0, input_tokens=1, max_tokens=10)
    assert delivered_by_window(waiting, 0.0, 10.0) == []


def test_ledger_windows_are_those_in_which_the_whole_time_was_owed() -> None:
    readings = [
        LedgerReading(1.0, 0.0, 0),
        LedgerReading(2.0, 100.0, 90),
        LedgerReading(3.0, 150.0, 190),  # idle for half of it
        LedgerReading(4.0, 250.0, 290),
        LedgerReading(5.0, 350.0, 390),  # after the measurement
    ]
    assert attained_by_reading(readings, 100.0, 0.5, 4.5) == pytest.approx([0.9, 1.0])


# --- estimates ----------------------------------------------------------------------------------------


def test_every_trial_hit_is_still_no_certainty() -> None:
    assert share_estimate(100, 100).low < 0.99 < share_estimate(500, 500).low
    assert share_estimate(500, 500).value == 1.0


def test_wilsons_interval_holds_its_known_value() -> None:
    estimate = share_estimate(90, 100)
    assert (estimate.low, estimate.high) == pytest.approx((0.8256, 0.9448), abs=1e-4)


def test_a_gap_of_percentiles_is_their_difference() -> None:
    under = [float(sample) for sample in range(101)]
    gap = percentile_gap([sample + 7.0 for sample in under], under, 0.5, seed=1)
    assert gap.value == pytest.approx(7.0)
    assert gap.low < 7.0 < gap.high


# --- pace and price -----------------------------------------------------------------------------------


def test_the_largest_batch_solves_the_step_time() -> None:
    points = [(streams, 1 / (0.002 + 0.0002 * streams)) for streams in (8, 16, 32, 64)]
    assert pace.largest_batch(points, 1 / 0.0081, most=64) == 30
    assert pace.largest_batch(points, 1.0, most=64) == 64
    assert pace.largest_batch(points, 10_000.0, most=64) == 1


def test_nothing_is_compared_with_a_server_that_served_nothing() -> None:
    with pytest.raises(NothingServedError, match="overloaded"):
        some(0.0)
    rows = [
        {"link": link, "total_tok_s": total} for link, total in enumerate((100.0, 110.0, 0.0, 90.0, 100.0))
    ]
    assert totals.link_ratios(rows) == ([], [])


def test_one_disturbed_phase_does_not_move_the_batch() -> None:
    points = [(streams, 1 / (0.002 + 0.0002 * streams)) for streams in (8, 16, 32, 64)] * 3
    assert pace.largest_batch([*points, (32, 20.0)], 1 / 0.0081, most=64) == 30


def _pace_rows(delivered: int, ours_tok_s: float) -> Rows:
    def row(run: str, number: int, total_tok_s: float, tokens: int) -> dict[str, Any]:
        return {
            **_CLEAN,
            "row": "pace",
            "system": SEATS if run == "ours" else PLAIN,
            "run": run,
            "round": number,
            "streams": 64,
            "guarantee_tok_s": 100.0,
            "owed_tok_s": float(tokens),
            "total_tok_s": total_tok_s,
            "windows_tokens": [tokens] * 100,
            "ledger_attained": [tokens / 100] * 100 if run == "ours" else [],
        }

    return [
        row(run, number, total_tok_s, tokens)
        for number in range(1, 6)
        for run, total_tok_s, tokens in (
            ("whole crowd", 4000.0, 50),
            ("before", 3000.0, 100),
            ("ours", ours_tok_s, delivered),
            ("after", 3200.0, 100),
        )
    ]


@pytest.mark.parametrize(
    ("delivered", "ours_tok_s", "met"),
    [
        (96, 3100.0, [True, True, True]),
        (94, 3100.0, [False, False, True]),
        (100, 2800.0, [True, True, False]),
    ],
)
def test_pace_and_price(delivered: int, ours_tok_s: float, met: list[bool]) -> None:
    part = pace.summarize(_CONFIG, _pace_rows(delivered, ours_tok_s))
    assert [check.met for check in part.checks] == met


# --- totals -------------------------------------------------------------------------------------------


def _chain_rows(row: str, ours_tok_s: float, start: int = 1) -> Rows:
    return [
        {
            **_CLEAN,
            "row": row,
            "case": "a case",
            "start": start,
            "link": link,
            "system": SEATS if link % 2 else PLAIN,
            "total_tok_s": ours_tok_s if link % 2 else 1000.0 + 10 * link,
        }
        for link in range(9)
    ]


def test_a_link_is_ours_over_the_mean_of_its_neighbours() -> None:
    rows = [{"link": link, "total_tok_s": total} for link, total in enumerate((100.0, 110.0, 120.0, 90.0))]
    ratios, controls = totals.link_ratios(rows)
    assert ratios == pytest.approx([1.0])
    assert controls == pytest.approx([1.2])


@pytest.mark.parametrize(("ours_tok_s", "met"), [(1080.0, True), (950.0, False)])
def test_totals(ours_tok_s: float, met: bool) -> None:
    for row in (totals.TOTAL_ROW, totals.LONE_ROW):
        part = row.summarize(_CONFIG, _chain_rows(row.name, ours_tok_s))
        assert [check.met for check in part.checks] == [met]


def test_of_several_starts_each_is_one_sample() -> None:
    rows = [
        row
        for start, ours_tok_s in enumerate((1000.0, 1040.0, 1080.0, 1120.0), 1)
        for row in _chain_rows("lone", ours_tok_s, start)
    ]
    figures = totals.LONE_ROW.summarize({**_CONFIG, "starts": 4}, rows).figures["a case"]
    assert [len(chain) for chain in figures["ratios"]] == [4, 4, 4, 4]
    assert figures["total_over_plain"]["samples"] == 4
    means = [sum(chain) / 4 for chain in figures["ratios"]]
    assert figures["total_over_plain"]["value"] == pytest.approx(sum(means) / 4)
    # Sixteen ratios as good as independent of each other would say more than four starts can.
    spread = max(means) - min(means)
    assert figures["total_over_plain"]["high"] - figures["total_over_plain"]["low"] > 0.5 * spread


def test_each_server_meets_the_load_before_a_chain_of_phases_with_requests_of_their_own() -> None:
    phases: list[Any] = []

    def phase(server: SimpleNamespace, clients: list[Any], **times: float) -> tuple[None, dict[str, Any]]:
        ((*load, seed),) = clients
        phases.append((server.launch.name, seed, load, times))
        return None, {**_CLEAN, "system": server.launch.name, "total_tok_s": 10.0 * len(phases)}

    plain, seats = (SimpleNamespace(launch=SimpleNamespace(name=name)) for name in (PLAIN, SEATS))
    bench = SimpleNamespace(
        config=Config("model", Path(), pairs=2),
        plain=plain,
        seats=seats,
        progress=lambda _: None,
        sell=lambda *_: None,
        crowd=lambda _server, *load: load,
        phase=phase,
    )
    rows = totals.LONE_ROW.measure(cast(Bench, bench))
    assert [name for name, *_ in phases] == [PLAIN, SEATS, PLAIN, SEATS, PLAIN, SEATS, PLAIN] * 2
    for chain in phases[:7], phases[7:]:
        assert all(phase[2:] == chain[0][2:] for phase in chain)
    assert len({seed for _, seed, *_ in phases}) == len(phases)
    part = totals.LONE_ROW.summarize(_CONFIG, [{**row, "start": 1} for row in rows])
    first, second = part.figures.values()
    assert (first["ratios"], first["uncounted"]) == ([[1.0, 1.0]], [[1.0]])
    assert [f"{first['controls'][0][0]:.3f}", f"{second['controls'][0][0]:.3f}"] == ["1.667", "1.200"]


def test_a_run_that_ends_early_leaves_what_was_measured_and_says_so(tmp_path: Path) -> None:
    left = iter([_chain_rows("total", 1080.0), _chain_rows("lone", 1080.0), _chain_rows("total", 1080.0)])

    def measure(_config: Config, session: list[Row], *_: Any) -> Iterator[Rows]:
        for _row in session:
            try:
                yield next(left)
            except StopIteration:
                raise KeyboardInterrupt from None

    config = Config("model", tmp_path, only=("total", "lone"), starts=3)
    with pytest.raises(KeyboardInterrupt):
        guarantee.run(config, lambda _: None, measure=measure)
    table = (tmp_path / "table.txt").read_text()
    assert "NOT MET  every row: up to total in start 2 of 3" in table
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["start"] for row in result["rows"]] == [1] * 18 + [2] * 9
    # Two of three starts are no reason to believe any of them.
    assert [check["met"] for check in result["checks"]] == [False, False, True, False]


def test_each_start_has_requests_of_its_own(tmp_path: Path) -> None:
    seeds = []

    def measure(config: Config, session: list[Row], *_: Any) -> Iterator[Rows]:
        seeds.append(config.seed)
        yield from (_chain_rows(row.name, 1080.0) for row in session)

    guarantee.run(Config("model", tmp_path, only=("lone",), starts=3), lambda _: None, measure=measure)
    assert seeds == [1, 2, 3]


@contextmanager
def _completions(status: int, done: list[tuple[str, int]], name: str) -> Iterator[Target]:
    """A server that answers each completion with `status` and notes how long its prompt was."""

    class Completions(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            done.append((name, len(body["prompt"])))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Completions) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Target(f"http://127.0.0.1:{server.server_port}", "demo")
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("seats_status", [200, 503])
def test_both_servers_meet_every_batch_size_before_anything_is_measured(seats_status: int) -> None:
    done: list[tuple[str, int]] = []
    plain, seats = (SimpleNamespace(launch=SimpleNamespace(name=name)) for name in (PLAIN, SEATS))
    with _completions(200, done, PLAIN) as to_plain, _completions(seats_status, done, SEATS) as to_seats:
        bench = SimpleNamespace(
            config=Config("model", Path(), warm_tokens=3),
            plain=plain,
            servers=(plain, seats),
            progress=lambda _: None,
            target=lambda server, _seat: to_plain if server is plain else to_seats,
            crowd=lambda *_: None,
            phase=lambda server, *_, **__: done.append((server.launch.name, 0)),
        )
        if seats_status == 200:
            warm_up(cast(Bench, bench))
        else:
            with pytest.raises(ServerStartError, match=r"seats did not answer while warming up: .*HTTP 503"):
                warm_up(cast(Bench, bench))
    met = [(PLAIN, 1), (PLAIN, 2), (PLAIN, 3), (PLAIN, 0), (SEATS, 1), (SEATS, 2), (SEATS, 3), (SEATS, 0)]
    assert done == (met if seats_status == 200 else met[:5])


def test_a_whole_run_says_nothing_of_an_end(tmp_path: Path) -> None:
    def measure(_config: Config, session: list[Row], *_: Any) -> Iterator[Rows]:
        return (_chain_rows(row.name, 1080.0) for row in session)

    config = Config("model", tmp_path, only=("total", "lone"), starts=3)
    said: list[str] = []
    result = guarantee.run(config, said.append, measure=measure)
    assert [check.met for check in result.checks] == [True, True, True]
    assert "start 3 of 3" in said[-1]


@pytest.mark.parametrize(
    ("starts", "drift", "swing", "unsteady"),
    [
        (3, 0.002, 0.0, False),
        (3, 0.010, 0.0, True),
        # Of two there is no interval, and the check says so.
        (2, 0.010, 0.0, False),
        (1, 0.0, 0.02, False),
        (1, 0.0, 0.05, True),
    ],
)
def test_a_control_too_wide_to_tell_is_named(starts: int, drift: float, swing: float, unsteady: bool) -> None:
    rows = [
        {**row, "total_tok_s": 1000.0 * (1 + row["link"] * drift * start + swing * (row["link"] % 4 == 2))}
        for start in range(1, starts + 1)
        for row in _chain_rows("lone", 1000.0, start)
    ]
    notes = totals.LONE_ROW.summarize({**_CONFIG, "starts": starts}, rows).notes
    assert ["too unsteady" in note for note in notes] == [True] * unsteady


def test_only_what_needs_several_starts_is_measured_on_each() -> None:
    config = Config("model", Path(), starts=3)
    first, *further = sessions(config)
    assert [row.name for row in first] == list(guarantee.ROWS)
    assert [[row.name for row in session] for session in further] == [["total", "lone"]] * 2
    assert [len(session) for session in sessions(replace(config, only=("pace",)))] == [1]


# --- isolation ----------------------------------------------------------------------------------------


def _isolation_rows(beside_s: float, flooder_tok_s: float) -> Rows:
    def row(number: int, system: str, condition: str, ttft_s: float, flooder_tok_s: float) -> dict[str, Any]:
        return {
            **_CLEAN,
            "row": "isolation",
            "round": number,
            "system": system,
            "condition": condition,
            "ttft_s": [ttft_s] * 50,
            "flooder_tok_s": flooder_tok_s,
            "step_s": 0.016,
            "failed": 0,
        }

    return [
        turn
        for number in range(1, 5)
        for turn in (
            row(number, SEATS, isolation.SOLO, 0.010, 0.0),
            row(number, SEATS, isolation.BESIDE, beside_s, flooder_tok_s),
            row(number, PLAIN, isolation.BESIDE, 5.0, 4000.0),
        )
    ]


@pytest.mark.parametrize(
    ("beside_s", "flooder_tok_s", "met"),
    [(0.057, 3900.0, [True, True]), (0.059, 3900.0, [False, True]), (0.020, 3700.0, [True, False])],
)
def test_isolation(beside_s: float, flooder_tok_s: float, met: list[bool]) -> None:
    part = isolation.summarize(_CONFIG, _isolation_rows(beside_s, flooder_tok_s))
    assert part.figures["allowed_ms"] == pytest.approx(48.0)
    assert [check.met for check in part.checks[:2]] == met


# --- shares -------------------------------------------------------------------------------------------


def _service(rates: tuple[float, ...], seconds: int = 121) -> list[dict[str, float]]:
    names = [seat.name for seat in shares.WEIGHTED]
    return [
        {"at_s": float(at_s), **{name: at_s * rate for name, rate in zip(names, rates, strict=True)}}
        for at_s in range(seconds)
    ]


def _shares_part(service: list[dict[str, float]]) -> list[bool]:
    rows = [{**_CLEAN, "row": "shares", "system": SEATS, "service": service}]
    return [check.met for check in shares.SHARES_ROW.summarize(_CONFIG, rows).checks]


def test_shares_by_weight_meet_both_targets() -> None:
    assert _shares_part(_service((10.0, 20.0, 30.0, 40.0))) == [True, True]


def test_a_share_that_is_off_misses_its_target() -> None:
    assert _shares_part(_service((10.3, 20.0, 30.0, 40.0))) == [False, True]
    assert _shares_part(_service((11.0, 20.0, 30.0, 40.0))) == [False, False]


def test_a_bad_window_is_not_hidden_by_a_good_run() -> None:
    service = _service((10.0, 20.0, 30.0, 40.0))
    for sample in service[60:]:  # 60 tokens early in the first window, as many late in the second
        sample["of 1"] += 60.0
    service[-1]["of 1"] -= 60.0
    assert _shares_part(service) == [True, False]


def test_a_window_without_service_misses_the_target() -> None:
    served, nothing = _service((10.0, 20.0, 30.0, 40.0), 61), _service((0.0, 0.0, 0.0, 0.0), 61)
    stalled = [{**sample, "at_s": sample["at_s"] + 60} | _totals(served[-1]) for sample in nothing[1:]]
    assert _shares_part([*served, *stalled]) == [True, False]


def _totals(sample: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in sample.items() if name != "at_s"}


def test_a_run_too_short_for_a_window_meets_nothing() -> None:
    assert _shares_part(_service((10.0, 20.0, 30.0, 40.0), seconds=30)) == [True, False]


@pytest.mark.parametrize(("ratio", "met"), [(1.03, True), (1.2, False), (0.8, False)])
def test_flood(ratio: float, met: bool) -> None:
    rows = [
        {**_CLEAN, "row": "flood", "system": system, "round": number, "ratio": ratio}
        for number in range(1, 6)
        for system in (PLAIN, SEATS)
    ]
    assert [check.met for check in shares.FLOOD_ROW.summarize(_CONFIG, rows).checks] == [met]


# --- return -------------------------------------------------------------------------------------------


def _samples(returning_rate: Callable[[float], float]) -> list[Sample]:
    """Output tokens at 100 a second for both together; the returning seat's part is a function of time."""
    samples, got = [], 0.0
    for tick in range(81):
        at_s = tick / 8
        got += 100 / 8 * returning_rate(at_s)
        served = {
            returning.RETURNING.name: Served(0, round(got)),
            returning.STAYING.name: Served(0, round(100 * at_s - got)),
        }
        samples.append(Sample(at_s, served))
    return samples


def test_a_seat_is_back_when_a_slice_has_nearly_its_full_rate() -> None:
    samples = _samples(lambda at_s: 0.5 if at_s > 3.0 else 0.1)
    parts = returning.slices(samples, 2.0, 6.0, 0.5)
    assert len(parts) == 8
    assert returning.full_after_s(parts, 0.5) == pytest.approx(1.5)


def test_a_seat_that_never_gets_its_rate_took_longer_than_its_visit() -> None:
    parts = returning.slices(_samples(lambda _at_s: 0.2), 2.0, 6.0, 0.5)
    assert returning.full_after_s(parts, 0.5) == 4.5


def test_a_burst_is_seen_though_the_whole_visit_has_none() -> None:
    samples = _samples(lambda at_s: 0.9 if 2.0 < at_s <= 3.0 else 0.3)
    running = returning.running_shares(samples, 2.0, 6.0, 0.5)
    assert running[-1] < 0.5
    assert max(running) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    ("after_s", "largest_share", "second", "met"),
    [
        (1.0, 0.49, 0.5, [True, True, True]),
        (2.5, 0.49, 0.5, [False, True, True]),
        (1.0, 0.6, 0.5, [True, False, True]),
        # What makes up for a slow first half second is no more than is due by then, but a burst by itself.
        (1.0, 0.49, 0.56, [True, True, False]),
    ],
)
def test_return(after_s: float, largest_share: float, second: float, met: list[bool]) -> None:
    row = {
        **_CLEAN,
        "row": "return",
        "system": SEATS,
        "slices": [0.4, second, 0.5],
        "full_after_s": after_s,
        "largest_share": largest_share,
    }
    assert [check.met for check in returning.summarize(_CONFIG, [row] * 50).checks] == met


# --- step time ----------------------------------------------------------------------------------------

_METRICS = """\
# TYPE boosts_step_scheduler_seconds histogram
boosts_step_scheduler_seconds_bucket{le="5e-05"} 90
boosts_step_scheduler_seconds_bucket{le="0.0001"} 98
boosts_step_scheduler_seconds_bucket{le="+Inf"} 100
boosts_step_scheduler_seconds_sum 0.004
boosts_step_scheduler_seconds_count 100
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_count{engine="0"} 40
vllm:iteration_tokens_total_count{engine="1"} 2
"""


def test_counters_are_read_from_metrics() -> None:
    assert counter(_METRICS, isolation.ITERATIONS) == 42
    assert counter(_METRICS, "nothing") == 0
    assert Histogram.read(_METRICS, "nothing") is None


def test_a_histogram_of_a_window_is_the_difference_of_its_ends() -> None:
    whole = Histogram.read(_METRICS, step_time.METRIC)
    assert whole is not None
    assert whole.mean == pytest.approx(40e-6)
    assert whole.share_within(100e-6) == 0.98
    assert whole.edge_above(0.98) == 0.0001
    assert whole.edge_above(0.99) == float("inf")
    assert (whole - whole).count == 0


@pytest.mark.parametrize(("mean_us", "met"), [(80.0, True), (120.0, False), (None, False)])
def test_step_time(mean_us: float | None, met: bool) -> None:
    row = {
        **_CLEAN,
        "row": "step-time",
        "system": SEATS,
        "case": step_time.TIGHT,
        "streams": 256,
        "steps": 1000,
        "mean_us": mean_us,
        "share_within": 0.99,
        "p99_at_most_us": 200.0,
        "edges_us": [100.0, float("inf")],
        "counts": [990, 1000],
    }
    assert [check.met for check in step_time.summarize(_CONFIG, [row]).checks] == [met]


# --- the whole ----------------------------------------------------------------------------------------


def _all_rows() -> Rows:
    return [
        *_pace_rows(96, 3100.0),
        *_chain_rows("total", 1050.0),
        *_isolation_rows(0.02, 3900.0),
        {**_CLEAN, "row": "shares", "system": SEATS, "service": _service((10.0, 20.0, 30.0, 40.0))},
    ]


# --- suites -------------------------------------------------------------------------------------------


def _suite_row(system: str, number: int, per_s: tuple[float, float]) -> dict[str, Any]:
    return {
        **_CLEAN,
        "row": "suites",
        "system": system,
        "suite": "overload",
        "round": number,
        "requests_s": [12.0, 24.0],
        "service": [{"at_s": 10.0 + s, "client0": per_s[0] * s, "client1": per_s[1] * s} for s in range(51)],
        "ttft_s": {"client0": [1.0], "client1": [2.0]},
        "refused": 0,
    }


@pytest.mark.parametrize(("more", "met"), [(100.0, True), (130.0, False), (200.0, False)])
def test_an_overload_is_shared_within_a_twentieth_of_vtcs_bound(more: float, met: bool) -> None:
    rows = [
        row
        for number, swing in enumerate((0.0, 10.0, 20.0), 1)
        for row in (
            _suite_row(SEATS, number, (5_000.0, 5_000.0 + more + swing)),
            _suite_row(PLAIN, number, (3_000.0, 7_000.0)),
        )
    ]
    part = suites.summarize(_CONFIG, rows)
    # 2U with 72 slots of 512 tokens is 147,456.
    gap = part.figures["overload_gap_of_2u"]
    assert gap[SEATS]["value"] == pytest.approx((more + 10) * 50 / 147_456)
    assert gap[PLAIN]["value"] == pytest.approx(200_000 / 147_456)
    assert part.checks[0].met is met


def test_a_report_has_every_measured_row_and_no_other(tmp_path: Path) -> None:
    result = guarantee.summarize(_CONFIG, _all_rows())
    assert set(result.figures) == {"pace", "total", "isolation", "shares"}
    assert all(check.met for check in result.checks)
    data, _, picture = write(result, tmp_path, guarantee.plot)
    assert len(json.loads(data.read_text())["rows"]) == len(result.rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_failed_request_misses_a_target() -> None:
    rows = _all_rows()
    rows[0] = {**rows[0], "errors": 1, "first_error": "HTTP 500"}
    assert "HTTP 500" in guarantee.summarize(_CONFIG, rows).checks[-1].measured
    assert not guarantee.summarize(_CONFIG, rows).checks[-1].met


def test_a_busy_machine_is_named() -> None:
    rows = _all_rows()
    assert guarantee.summarize(_CONFIG, rows).notes == ()
    rows[0] = {**rows[0], "other_cores": 1.2}
    (note,) = guarantee.summarize(_CONFIG, rows).notes
    assert f"1 of {len(rows)} phases, at most 1.20" in note


def test_the_whole_run_stays_under_ninety_minutes_and_a_quick_one_under_seven_minutes() -> None:
    config = Config("model", Path())
    assert expected_s(config) < 90 * 60
    assert expected_s(config.quick()) < 7 * 60
    assert expected_s(replace(config, only=("flood",))) < expected_s(config) / 5


@pytest.mark.parametrize("scenario", [["guarantee", "--model", "m"], ["gpu"]])
def test_an_unknown_row_is_refused_by_name(scenario: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*scenario, "--only", "pace,speed"])
    assert "no such row: speed" in capsys.readouterr().err


@pytest.mark.parametrize(("only", "rows"), [([], gpu.ROWS), (["--only", "pace,lone"], ("pace", "lone"))])
def test_a_gpu_run_is_a_scenario_like_others(
    only: list[str], rows: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def run(config: Config, *_: Any) -> None:
        measured.append(config)
        raise ServerStartError("did not start")

    monkeypatch.setattr(gpu, "missing_gpu", lambda: None)
    monkeypatch.setattr(gpu, "run", run)
    assert main(["gpu", "--quick", "--out", str(tmp_path), *only]) == 2
    assert [(config.only, config.folder, config.pace_rounds) for config in measured] == [(rows, tmp_path, 2)]


def test_without_a_gpu_its_scenario_says_why_it_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "missing_gpu", lambda: "no CUDA GPU here")
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "skipped: no CUDA GPU here\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--starts", "2", "1, or 3 and more"),
        ("--starts", "0", "at least 1"),
        ("--pace-rounds", "0", "at least 1"),
    ],
)
def test_a_run_that_could_show_nothing_is_refused(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["guarantee", "--model", "m", option, value])
    assert said in capsys.readouterr().err


def test_a_gpu_run_is_long_enough_for_pace_and_isolation_and_a_quick_one_is_quick(tmp_path: Path) -> None:
    config = gpu.gpu_config(tmp_path)
    (session,) = sessions(config)
    assert [row.name for row in session] == list(gpu.ROWS)
    assert expected_s(config) < 35 * 60
    assert expected_s(config.quick()) < 5 * 60
    # A tenth for the first second of each stream.
    busy_s = round(0.9 * config.pace_rounds * config.pace_s)
    assert share_estimate(busy_s, busy_s).low >= pace.WINDOWS_TARGET
    assert config.isolation_rounds * config.quiet_seats * config.beside_s >= 1_000


def test_qwen3_8b_is_written_whole_with_a_word_for_every_id(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = gpu.write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.decode([0, 151_935]) == "w0 w151935"
    assert gpu.write_model(tmp_path / "model") == folder
