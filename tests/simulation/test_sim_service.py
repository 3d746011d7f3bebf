"""The paper's workloads are drawn as published, and its measures computed as its artifact does."""

from pathlib import Path

import pytest

from benchmarks.simulator import __main__ as command
from benchmarks.simulator import paper
from benchmarks.simulator.entry import published
from benchmarks.simulator.experiment import Played, Served
from benchmarks.simulator.machines import LLAMA2_7B_A10G
from benchmarks.simulator.service import differences, gaps, percentile, shares, ticks
from benchmarks.simulator.workloads import LENGTHS, SUITES, Request, Workload, read_trace, suite, with_lengths


def test_suites_are_the_published_ones() -> None:
    overload = suite("overload")
    # The first arrivals of the artifact's own record of `overload` (VTC/all_results_overload.jsonl), whose
    # rates and seed are the same though its run was longer.
    first = [(request.client, round(request.arrival_s, 4)) for request in overload.requests[:3]]
    assert first == [("client1", 0.6502), ("client0", 0.9164), ("client1", 0.9836)]
    assert len(overload.requests) == 1.5 * 360 + 3 * 360
    assert all((r.input_tokens, r.output_tokens) == (256, 256) for r in overload.requests)
    assert suite("overload-weighted").weight("client3") == 4


def test_on_off_client_pauses_every_other_minute() -> None:
    mine = [r.arrival_s for r in suite("on_off_less").requests if r.client == "client0"]
    assert {int(at // 60) % 2 for at in mine} == {0}


@pytest.mark.parametrize("law", LENGTHS)
def test_lengths_keep_their_mean(law: str) -> None:
    load = with_lengths(suite("overload"), law, 1)
    outputs = [request.output_tokens for request in load.requests]
    assert sum(outputs) / len(outputs) == pytest.approx(256, rel=0.1)
    assert min(outputs) >= 1
    assert [r.arrival_s for r in load.requests] == [r.arrival_s for r in suite("overload").requests]


@pytest.mark.parametrize("name", SUITES)
def test_arrivals_are_in_order(name: str) -> None:
    arrivals = [request.arrival_s for request in suite(name).requests]
    assert arrivals == sorted(arrivals)


def test_trace_is_the_whole_arena_trace() -> None:
    trace = read_trace(command.TRACE)
    assert len(trace.requests) == 1_500
    assert len(trace.clients) == 27
    assert sum(request.output_tokens for request in trace.requests) == 384_297


def played(*served: Served, weights: dict[str, float] | None = None) -> Played:
    requests = tuple(s.request for s in served)
    return Played(Workload("made up", requests, weights or {}), "none", served, 200.0, 0)


def one(number: int, client: str, arrival: float, first: float | None, end: float | None) -> Served:
    return Served(Request(number, client, arrival, 100, 100), first is None, first, end)


def test_service_is_spread_evenly_from_first_token_to_end() -> None:
    # b's whole 300 fall between 100 and 200 s, a's between 30 and 130 s; the last arrival sets the ticks.
    run = played(one(0, "a", 0.0, 30.0, 130.0), one(1, "b", 100.0, 100.0, 200.0))
    at = ticks(run)
    assert (len(at), at[0], at[-1]) == (19, 5.0, 95.0)
    gap = dict(gaps(run))
    assert gap[50.0] == pytest.approx(300 * (80 - 30) / 100)
    assert gap[90.0] == pytest.approx(300 * (120 - 30) / 100 - 300 * (120 - 100) / 100)
    weighted = played(*run.served, weights={"a": 3.0})
    assert dict(gaps(weighted))[50.0] == pytest.approx(300 * 50 / 100 / 3)


def test_difference_is_what_a_client_lacks_up_to_what_it_sent() -> None:
    run = played(one(0, "a", 0.0, 30.0, 130.0), one(1, "b", 100.0, 100.0, 200.0))
    # Tick 50, so from 50 to 110 s: a got 180 and sent nothing; b got 30 and sent 300.
    at_50 = differences(run)[ticks(run).index(50.0)]
    lacks_a, lacks_b = 0.0, min(180 - 30, 300 - 30)
    assert at_50 == pytest.approx((lacks_a + lacks_b) / 60)


def test_refused_requests_are_neither_sent_nor_served() -> None:
    run = played(
        one(0, "a", 0.0, 30.0, 130.0), one(1, "b", 100.0, 100.0, 200.0), one(2, "b", 100.0, None, None)
    )
    both = played(*run.served[:2])
    assert differences(run) == differences(both)
    assert shares(run).served == 2
    assert shares(run).tok_s == pytest.approx(400 / 200)


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(i) for i in range(100)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (50.0, 99.0)


def test_fitted_machine_has_the_published_rows_within_10_percent() -> None:
    """Two rows here, for time's sake; `make simulate` shows them all."""
    trace = read_trace(command.TRACE)
    for name in ("VTC", "RPM 15"):
        found = paper.mean(paper.simulated(trace, published(trace.weights)[name], LLAMA2_7B_A10G))
        errors = paper.ARENA[name].errors(found)
        assert max(map(abs, errors.values())) <= paper.TOLERANCE, errors


def test_command_replays_seeds_and_says_so_by_its_exit_status(tmp_path: Path) -> None:
    assert command.main(["soak", "--first", "7", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "soak.json").is_file()
    with pytest.raises(SystemExit) as wrong:
        command.main(["soak", "--seeds", "0"])
    assert wrong.value.code == 2
