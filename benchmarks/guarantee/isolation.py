"""Row *isolation*: quiet seats beside one that floods the node with three times what it can serve.

Each of a few quiet seats sends one short request a second, never one beside the other, which would be more
than it bought; the flooder sends its own whether or not earlier ones were answered. A quiet request's first
token may come at most three steps of the flooder's batch later than when the quiet seats have the node to
themselves, at the 99th percentile; and the flooder must lose next to nothing by it. The time of a step is
counted by vLLM: seconds by engine iterations, while the flood lasts.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.estimates import median, median_estimate, percentile, percentile_gap
from benchmarks.guarantee.bench import Bench, Part, Row, Rows, some, tell
from benchmarks.guarantee.config import Config
from benchmarks.guarantee.counters import counter
from benchmarks.load import Client, Paced, RequestRecord
from benchmarks.report import COLORS, PLAIN, SEATS, Check, Table
from benchmarks.seats import Seat
from benchmarks.servers import Server

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOODER = Seat("flooder")
SOLO, BESIDE = "solo", "beside the flooder"
STEPS, FLOODER_TARGET = 3, 0.95

_DRAIN_S = 2.0
"""For the last quiet requests. Plain vLLM's queue is longer than any window: what has waited until then is
given up, and has waited at least so long."""

ITERATIONS = "vllm:iteration_tokens_total_count"
"""vLLM's own count of engine steps."""


def waited_s(record: RequestRecord) -> float | None:
    """To the first token. One that was given up has waited at least so long; a refused one has no time."""
    if record.ttft_s is not None:
        return record.ttft_s
    return record.finished_s - record.sent_s if record.cut and record.finished_s is not None else None


def seconds(config: Config) -> float:
    measured_s = config.solo_s + 2 * config.beside_s
    capacity_s = config.warm_s + config.calibration_s
    return capacity_s + config.isolation_rounds * (3 * config.warm_s + measured_s + _DRAIN_S)


def measure(bench: Bench) -> Rows:
    config = bench.config
    quiet = [Seat(f"quiet-{number}") for number in range(1, config.quiet_seats + 1)]
    bench.sell([*quiet, FLOODER], config.easy_guarantee_tok_s)
    tell(bench, "isolation", 0, config.isolation_rounds, "plain vLLM, what it can serve")
    crowd = bench.crowd(bench.plain, FLOODER, config.max_num_seqs, config.noisy_output, "capacity")
    full, _ = bench.phase(bench.plain, [crowd], window_s=config.calibration_s)
    mean_output = (config.noisy_output.low + config.noisy_output.high) / 2
    requests_s = config.flood_times * some(full.output_tok_s(FLOODER.name)) / mean_output
    rows = []
    for number in range(1, config.isolation_rounds + 1):
        turns = [
            (bench.seats, SOLO, config.solo_s),
            (bench.seats, BESIDE, config.beside_s),
            (bench.plain, BESIDE, config.beside_s),
        ]
        # The order alternates, so that a drift of the machine falls on both systems.
        for server, condition, window_s in turns if number % 2 else turns[::-1]:
            tell(bench, "isolation", number, config.isolation_rounds, f"{server.launch.name}, {condition}")
            rows.append(_phase(bench, server, quiet, condition, window_s, number, requests_s))
    return rows


def _phase(
    bench: Bench,
    server: Server,
    quiet: list[Seat],
    condition: str,
    window_s: float,
    number: int,
    flood_requests_s: float,
) -> dict[str, Any]:
    config = bench.config
    seed = f"{config.seed}/isolation/{number}/{condition}"
    clients: list[Client] = [
        Paced(
            seat.name,
            bench.target(server, seat),
            1.0,
            config.quiet_input,
            config.quiet_output,
            seed,
            pacing="jittered",
        )
        for seat in quiet
    ]
    if condition == BESIDE:
        clients.append(_flood(bench, server, 1 / flood_requests_s, seed))
    steps = counter(server.metrics(), ITERATIONS)
    phase, common = bench.phase(
        server, clients, window_s=window_s, refusable={FLOODER.name}, drain_s=_DRAIN_S
    )
    steps = counter(server.metrics(), ITERATIONS) - steps
    names = {seat.name for seat in quiet}
    requests = [record for name in names for record in phase.of(name)]
    return {
        "row": "isolation",
        **common,
        "condition": condition,
        "round": number,
        "flood_requests_s": flood_requests_s if condition == BESIDE else 0.0,
        "flooder_tok_s": phase.output_tok_s(FLOODER.name) if condition == BESIDE else 0.0,
        "flooder_refused": sum(
            record.status == 503 for record in phase.records if record.client == FLOODER.name
        ),
        "step_s": common["ran_s"] / steps if steps else None,
        "ttft_s": [s for record in requests if (s := waited_s(record)) is not None],
        "failed": sum(not record.ok for record in requests),
    }


def _flood(bench: Bench, server: Server, interval_s: float, seed: str) -> Paced:
    config = bench.config
    return Paced(
        FLOODER.name,
        bench.target(server, FLOODER),
        interval_s,
        config.noisy_input,
        config.noisy_output,
        seed,
        max_requests=100_000,
        awaited=False,
    )


def summarize(config: dict[str, Any], rows: Rows) -> Part:
    seed = config["seed"]
    waits = {key: [s for row in _where(rows, *key) for s in row["ttft_s"]] for key in _GROUPS}
    steps_s = [row["step_s"] for row in _where(rows, SEATS, BESIDE) if row["step_s"]]
    allowed_ms = 1000 * STEPS * median(steps_s)
    beside_ms, solo_ms = ([1000 * s for s in waits[SEATS, condition]] for condition in (BESIDE, SOLO))
    gap = percentile_gap(beside_ms, solo_ms, 0.99, seed)
    flooder = median_estimate(_flooder_ratios(rows), seed)
    failed = sum(row["failed"] for row in rows if row["system"] == SEATS)
    return Part(
        figures={
            "ttft_p99_gap_ms": asdict(gap),
            "allowed_ms": allowed_ms,
            "flooder_over_plain": asdict(flooder),
            "failed": failed,
        },
        tables=(_table(rows, waits),),
        checks=(
            Check(
                f"isolation: quiet TTFT p99 beside the flooder at most {STEPS} of its steps over solo",
                f"{gap} ms more, {len(beside_ms)} requests beside it, {len(solo_ms)} solo; "
                f"{allowed_ms:.1f} ms allowed",
                gap.high <= allowed_ms,
            ),
            Check(
                f"isolation: the flooder's throughput over plain vLLM's at least {FLOODER_TARGET:.2f}",
                f"{flooder} over {flooder.samples} rounds",
                flooder.low >= FLOODER_TARGET,
            ),
            Check("isolation: no quiet request fails on our node", f"{failed} failed", failed == 0),
        ),
    )


_GROUPS = ((SEATS, SOLO), (SEATS, BESIDE), (PLAIN, BESIDE))


def _where(rows: Rows, system: str, condition: str) -> Rows:
    return [row for row in rows if row["system"] == system and row["condition"] == condition]


def _flooder_ratios(rows: Rows) -> list[float]:
    ours, plain = (
        {row["round"]: row["flooder_tok_s"] for row in _where(rows, system, BESIDE)}
        for system in (SEATS, PLAIN)
    )
    return [ours[number] / plain[number] for number in sorted(ours.keys() & plain.keys()) if plain[number]]


def _table(rows: Rows, waits: dict[tuple[str, str], list[float]]) -> Table:
    def line(system: str, condition: str) -> tuple[str, ...]:
        of_group, waits_ms = _where(rows, system, condition), [1000 * s for s in waits[system, condition]]
        steps_ms = [1000 * row["step_s"] for row in of_group if row["step_s"]]
        return (
            f"{system}, {condition}",
            str(len(waits_ms)),
            *(f"{percentile(waits_ms, share):,.0f}" for share in (0.5, 0.95, 0.99)),
            f"{median(steps_ms):.1f}",
            f"{median([row['flooder_tok_s'] for row in of_group]):,.0f}",
        )

    return Table(
        title="Quiet seats of one request a second beside a flooder of three times the machine's capacity",
        columns=("system", "requests", "TTFT p50 ms", "p95 ms", "p99 ms", "step ms", "flooder tok/s"),
        rows=tuple(line(*key) for key in _GROUPS),
    )


def plot(axes: Axes, rows: Rows, part: Part) -> None:
    """Every quiet request's first token, as a distribution."""
    for (system, condition), style in zip(_GROUPS, (":", "-", "-"), strict=True):
        waits_ms = [1000 * s for row in _where(rows, system, condition) for s in row["ttft_s"]]
        if waits_ms:
            axes.ecdf(waits_ms, linestyle=style, color=COLORS[system], label=f"{system}, {condition}")
    axes.set_xscale("log")
    axes.set(
        title=f"Quiet seats; allowed {part.figures['allowed_ms']:.0f} ms more at p99",
        xlabel="time to first token, ms",
        ylabel="share of requests",
    )
    axes.legend(fontsize=8)


ROW = Row(
    "isolation",
    "quiet seats' first tokens beside a flooder of three times the capacity",
    seconds,
    measure,
    summarize,
    plot,
)
