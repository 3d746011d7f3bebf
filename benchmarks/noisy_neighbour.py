"""Scenario: a quiet seat alone, then beside a noisy one that floods the same engine.

The quiet seat sends a short request every now and then. The noisy one keeps more streams open than the
engine has slots, of random lengths. Plain vLLM queues them all in one line; a node with seats should let
the quiet seat through. Both systems are loaded at once and measured in turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.completions import Target
from benchmarks.estimates import median, percentile, percentile_ratio
from benchmarks.load import Client, ClosedLoop, Lengths, Paced, Phase, RequestRecord, run_phase
from benchmarks.report import COLORS, PLAIN, SEATS, Check, Result, Table, instrument_notes, label_bars
from benchmarks.seats import Seat, write_entitlements
from benchmarks.servers import SERVED_NAME, Engine, Progress, Server, plain_vllm, running, seat_node

ALONE, BESIDE = "alone", "beside noise"
TARGET_RATIO = 3.0
"""Plain vLLM's TTFT p99 over ours, beside the noise."""
QUIET = Seat("quiet")
NOISY = Seat("noisy")

_QUIET_INPUT, _QUIET_OUTPUT = Lengths(16, 64), Lengths(16, 48)
_NOISY_INPUT, _NOISY_OUTPUT = Lengths(16, 256), Lengths(32, 512)


@dataclass(frozen=True, slots=True)
class Config:
    """One run of the scenario. Times are in seconds."""

    model: str
    folder: Path
    """Where logs and results go."""
    rounds: int = 3
    phase_s: float = 20.0
    warm_s: float = 3.0
    max_num_seqs: int = 32
    noisy_streams: int = 64
    quiet_interval_s: float = 0.8
    """Mean time between the quiet seat's requests (Poisson)."""
    guarantee_tok_s: float = 20.0
    quiet_input: Lengths = _QUIET_INPUT
    quiet_output: Lengths = _QUIET_OUTPUT
    noisy_input: Lengths = _NOISY_INPUT
    noisy_output: Lengths = _NOISY_OUTPUT
    seed: int = 1


def run(config: Config, progress: Progress) -> Result:
    """Measure both systems in turns. Raises ServerStartError when one does not start."""
    engine = Engine(config.model, config.max_num_seqs)
    entitlements = config.folder / "entitlements.json"
    write_entitlements([QUIET, NOISY], entitlements, guarantee_tok_s=config.guarantee_tok_s)
    rows: list[dict[str, Any]] = []
    requests: list[dict[str, Any]] = []
    with running([plain_vllm(engine), seat_node(engine, entitlements)], config.folder, progress) as servers:
        for server in servers:
            progress(f"{server.launch.name}: warming up")
            _phase(config, server, BESIDE, "warm", window_s=min(5.0, config.phase_s))
        for number in range(1, config.rounds + 1):
            # The order alternates, so that a drift of the machine falls on both.
            for server in servers if number % 2 else servers[::-1]:
                (other,) = [each for each in servers if each is not server]
                for condition in (ALONE, BESIDE):
                    progress(
                        f"round {number} of {config.rounds}: {server.launch.name}, quiet seat {condition}"
                    )
                    used_s = other.cpu_s()
                    phase = _phase(config, server, condition, str(number), config.phase_s)
                    label = {"system": server.launch.name, "condition": condition, "round": number}
                    idle_cores = (other.cpu_s() - used_s) / (config.warm_s + phase.window_s)
                    rows.append({**label, **_row(phase), "idle_server_cores": idle_cores})
                    requests += [{**label, **_request(record)} for record in phase.of(QUIET.name)]
    return summarize(asdict(config), rows, requests)


def _phase(config: Config, server: Server, condition: str, round_name: str, window_s: float) -> Phase:
    seed = f"{config.seed}/{round_name}/{condition}"
    quiet, noisy = (Target(server.launch.base_url, SERVED_NAME, seat.key) for seat in (QUIET, NOISY))
    clients: list[Client] = [
        Paced(QUIET.name, quiet, config.quiet_interval_s, config.quiet_input, config.quiet_output, seed)
    ]
    if condition == BESIDE:
        clients.append(
            ClosedLoop(NOISY.name, noisy, config.noisy_streams, config.noisy_input, config.noisy_output, seed)
        )
    warm_s = config.warm_s if condition == BESIDE else min(1.0, config.warm_s)
    return asyncio.run(run_phase(clients, warm_s=warm_s, window_s=window_s))


def _row(phase: Phase) -> dict[str, Any]:
    """One phase's rates; requests are kept by themselves."""
    rates = {name: phase.output_tok_s(name) for name in phase.served}
    noisy = [record for record in phase.records if record.client == NOISY.name]
    return {
        "window_s": phase.window_s,
        "quiet_tok_s": rates[QUIET.name],
        "noisy_tok_s": rates.get(NOISY.name, 0.0),
        "total_tok_s": sum(rates.values()),
        "noisy_requests": len(noisy),
        "noisy_errors": sum(record.error is not None for record in noisy),
        "max_lag_s": phase.max_lag_s,
    }


def _request(record: RequestRecord) -> dict[str, Any]:
    """A quiet request. One that was given up has waited at least so long; a failed one has no time."""
    waited_s = record.ttft_s
    if waited_s is None and record.cut and record.finished_s is not None:
        waited_s = record.finished_s - record.sent_s
    return {
        **asdict(record),
        "ok": record.ok,
        "ttft_s": waited_s,
        "decode_tok_s": record.decode_tok_s,
        "late_s": record.sent_s - record.due_s,
    }


def summarize(config: dict[str, Any], rows: list[dict[str, Any]], requests: list[dict[str, Any]]) -> Result:
    """The figures of all rounds together."""
    figures: dict[str, Any] = {}
    for condition in (ALONE, BESIDE):
        for system in (PLAIN, SEATS):
            figures[f"{system}, {condition}"] = _summary(
                _where(rows, system, condition), _where(requests, system, condition)
            )
    plain, seats = (_waits_s(_where(requests, system, BESIDE)) for system in (PLAIN, SEATS))
    ratio = percentile_ratio(plain, seats, 0.99, config["seed"])
    figures["ttft_p99_ratio_plain_over_seats"] = asdict(ratio)
    failed = figures[f"{SEATS}, {BESIDE}"]["failed"]
    checks = (
        Check(
            f"quiet seat's TTFT p99 beside noise, plain vLLM over ours, at least {TARGET_RATIO:.0f}",
            f"{ratio} over {ratio.samples} requests",
            ratio.low >= TARGET_RATIO,
        ),
        Check("no failed request of the quiet seat on our node", f"{failed} failed", failed == 0),
    )
    return Result(
        scenario="noisy-neighbour",
        config=config,
        figures=figures,
        tables=(_table(figures),),
        checks=checks,
        rows=rows,
        requests=requests,
        notes=instrument_notes(rows),
    )


def _where(rows: list[dict[str, Any]], system: str, condition: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["system"] == system and row["condition"] == condition]


def _waits_s(requests: list[dict[str, Any]]) -> list[float]:
    return [request["ttft_s"] for request in requests if request["ttft_s"] is not None]


def _summary(rows: list[dict[str, Any]], requests: list[dict[str, Any]]) -> dict[str, Any]:
    ttft_ms = [1000 * wait_s for wait_s in _waits_s(requests)]
    decode = [request["decode_tok_s"] for request in requests if request["decode_tok_s"] is not None]
    return {
        "requests": len(requests),
        "failed": sum(not request["ok"] for request in requests),
        "ttft_p50_ms": percentile(ttft_ms, 0.50),
        "ttft_p95_ms": percentile(ttft_ms, 0.95),
        "ttft_p99_ms": percentile(ttft_ms, 0.99),
        "quiet_stream_tok_s": median(decode),
        "quiet_tok_s": median([row["quiet_tok_s"] for row in rows]),
        "noisy_tok_s": median([row["noisy_tok_s"] for row in rows]),
        "total_tok_s": median([row["total_tok_s"] for row in rows]),
    }


_COLUMNS = {
    "requests": "requests",
    "failed": "failed",
    "ttft_p50_ms": "TTFT p50 ms",
    "ttft_p95_ms": "p95 ms",
    "ttft_p99_ms": "p99 ms",
    "quiet_stream_tok_s": "stream tok/s",
    "noisy_tok_s": "noisy tok/s",
    "total_tok_s": "total tok/s",
}


def _table(figures: dict[str, Any]) -> Table:
    return Table(
        title="The quiet seat's time to first token and rate, and the machine's (medians over rounds)",
        columns=("quiet seat", *_COLUMNS.values()),
        rows=tuple(
            (name, *(f"{figure[key]:,.0f}" for key in _COLUMNS))
            for name, figure in figures.items()
            if "ttft_p50_ms" in figure
        ),
    )


def plot(result: Result, figure: Figure) -> None:
    """Latency as bars and as a distribution, and what the throughput was shared into."""
    ratio = result.figures["ttft_p99_ratio_plain_over_seats"]["value"]
    config = result.config
    figure.suptitle(
        f"A quiet seat beside {config['noisy_streams']} noisy streams on {config['max_num_seqs']} engine "
        f"slots: plain vLLM's TTFT p99 is {ratio:.1f} times ours"
    )
    bars, distribution, throughput = figure.subplots(1, 3)
    _plot_bars(bars, result.figures)
    _plot_distribution(distribution, result.requests)
    _plot_throughput(throughput, result.figures)


def _plot_bars(axes: Axes, figures: dict[str, Any]) -> None:
    for place, system in enumerate((PLAIN, SEATS)):
        summary = figures[f"{system}, {BESIDE}"]
        heights = [summary[f"ttft_p{share}_ms"] for share in (50, 95, 99)]
        axes.bar([x + 0.38 * place for x in range(3)], heights, 0.36, label=system, color=COLORS[system])
    label_bars(axes, "%.0f")
    axes.set_xticks([x + 0.19 for x in range(3)], ["p50", "p95", "p99"])
    axes.set(title="Quiet seat beside noise", ylabel="time to first token, ms (lower is better)")
    axes.margins(y=0.15)
    axes.legend()


def _plot_distribution(axes: Axes, requests: Sequence[dict[str, Any]]) -> None:
    for system in (PLAIN, SEATS):
        for condition, style in ((ALONE, ":"), (BESIDE, "-")):
            waits_ms = [1000 * wait_s for wait_s in _waits_s(_where(list(requests), system, condition))]
            if waits_ms:
                axes.ecdf(waits_ms, linestyle=style, color=COLORS[system], label=f"{system}, {condition}")
    axes.set_xscale("log")
    axes.set(
        title="Every request of the quiet seat", xlabel="time to first token, ms", ylabel="share of requests"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _plot_throughput(axes: Axes, figures: dict[str, Any]) -> None:
    for place, system in enumerate((PLAIN, SEATS)):
        summary = figures[f"{system}, {BESIDE}"]
        axes.bar(place, summary["total_tok_s"], 0.6, color=COLORS[system])
    label_bars(axes, "%.0f")
    axes.set_xticks([0, 1], [PLAIN, SEATS])
    axes.set(title="All seats together, beside noise", ylabel="output tokens per second (higher is better)")
    axes.margins(y=0.15)
