"""Scenario: two backlogged seats share by weight, and a lone seat gets the whole machine.

*Shares*: both seats keep more requests waiting than the engine takes, with very different numbers of
connections; each should be served in proportion to its quantity. Service is what the fair queue charges:
input tokens + 2 * output tokens. Plain vLLM knows no seats; it is shown once for contrast.

*Lone seat*: its throughput over plain vLLM's, in triples plain, ours, plain. Each gives one ratio against
the mean of its two plain runs and one of the plain runs against each other: an A/A control that shows the
instrument's own spread, over a longer distance in time and so rather too wide than too narrow.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.completions import Target
from benchmarks.estimates import Estimate, median, median_estimate
from benchmarks.load import ClosedLoop, Lengths, Phase, run_phase
from benchmarks.report import COLORS, PLAIN, SEATS, Check, Result, Table, instrument_notes
from benchmarks.seats import Seat, write_entitlements
from benchmarks.servers import SERVED_NAME, Engine, Progress, Server, plain_vllm, running, seat_node

TOLERANCE = 0.05
"""How far the ratio of two seats' service per weight may be from 1."""
LONE_TARGET = 0.97
"""A lone seat's throughput over plain vLLM's, at least."""

# Short requests, so that those which straddle the ends of a window weigh little.
_SHORT, _MEDIUM = Lengths(16, 128), Lengths(64, 256)

_STEADY = 0.1
"""Widest interval of the A/A control with which the lone seat's figure means something."""

LIGHT, OTHER, HEAVY = Seat("light"), Seat("other"), Seat("heavy", quantity=3)


@dataclass(frozen=True, slots=True)
class Case:
    """Two backlogged seats and their connections."""

    first: Seat
    first_connections: int
    second: Seat
    second_connections: int

    def __str__(self) -> str:
        return (
            f"weights {self.first.quantity}:{self.second.quantity}, "
            f"connections {self.first_connections}:{self.second_connections}"
        )


@dataclass(frozen=True, slots=True)
class Config:
    """One run of the scenario. Times are in seconds."""

    model: str
    folder: Path
    """Where logs and results go."""
    rounds: int = 5
    """Of every case of two seats; 0 leaves them out."""
    share_s: float = 15.0
    share_warm_s: float = 4.0
    pairs: int = 20
    """Of a lone seat and plain vLLM; 0 leaves them out."""
    pair_s: float = 5.0
    pair_warm_s: float = 2.0
    max_num_seqs: int = 64
    few_connections: int = 80
    many_connections: int = 200
    lone_connections: int = 48
    """Fewer than the slots; with more, the figure shows also how soon a freed slot is filled again."""
    guarantee_tok_s: float = 20.0
    share_input: Lengths = _SHORT
    share_output: Lengths = _SHORT
    lone_input: Lengths = _SHORT
    lone_output: Lengths = _MEDIUM
    seed: int = 1

    def cases(self) -> tuple[Case, ...]:
        few, many = self.few_connections, self.many_connections
        return (
            Case(LIGHT, few, OTHER, many),
            Case(LIGHT, many, HEAVY, few),
            Case(LIGHT, few, HEAVY, many),
        )


def run(config: Config, progress: Progress) -> Result:
    """Measure the shares, then the lone seat. Raises ServerStartError when a server does not start."""
    engine = Engine(config.model, config.max_num_seqs)
    entitlements = config.folder / "entitlements.json"
    write_entitlements([LIGHT, OTHER, HEAVY], entitlements, guarantee_tok_s=config.guarantee_tok_s)
    rows: list[dict[str, Any]] = []
    with running([plain_vllm(engine), seat_node(engine, entitlements)], config.folder, progress) as servers:
        plain, seats = servers
        for server in servers:
            progress(f"{server.launch.name}: warming up")
            _lone_phase(config, server, "warm")
        for number in range(1, config.rounds + 1):
            for case in config.cases():
                # Plain vLLM has no weights to keep, so once is enough to show what it does instead.
                for server in (plain, seats) if number == 1 else (seats,):
                    progress(f"round {number} of {config.rounds}: {server.launch.name}, {case}")
                    rows.append(_share_row(config, case, number, server, servers))
        for number in range(1, config.pairs + 1):
            progress(f"lone seat, pair {number} of {config.pairs}")
            for run_name, server in (("before", plain), ("ours", seats), ("after", plain)):
                rows.append(_lone_row(config, run_name, number, server, servers))
    return summarize(asdict(config) | {"cases": [str(case) for case in config.cases()]}, rows)


def _share_row(
    config: Config, case: Case, number: int, server: Server, servers: list[Server]
) -> dict[str, Any]:
    used_s = _idle_cpu_s(server, servers)
    clients = [
        ClosedLoop(
            seat.name,
            Target(server.launch.base_url, SERVED_NAME, seat.key),
            connections,
            config.share_input,
            config.share_output,
            f"{config.seed}/{number}",
        )
        for seat, connections in (
            (case.first, case.first_connections),
            (case.second, case.second_connections),
        )
    ]
    phase = asyncio.run(run_phase(clients, warm_s=config.share_warm_s, window_s=config.share_s))
    first, second = (phase.served[client.name].cost() for client in clients)
    idle_s = _idle_cpu_s(server, servers) - used_s
    return {
        "part": "shares",
        "system": server.launch.name,
        "case": str(case),
        "round": number,
        "first_service": first,
        "second_service": second,
        "ratio": weighted_ratio(first, case.first.quantity, second, case.second.quantity),
        **_common(phase, idle_s / (config.share_warm_s + config.share_s)),
    }


def weighted_ratio(first: float, first_weight: float, second: float, second_weight: float) -> float:
    """First seat's service per weight over the second's: 1 is fair. Infinite when the second got nothing."""
    return (first / first_weight) / (second / second_weight) if second else float("inf")


def _lone_phase(config: Config, server: Server, round_name: str) -> Phase:
    client = ClosedLoop(
        LIGHT.name,
        Target(server.launch.base_url, SERVED_NAME, LIGHT.key),
        config.lone_connections,
        config.lone_input,
        config.lone_output,
        f"{config.seed}/{round_name}",
    )
    return asyncio.run(run_phase([client], warm_s=config.pair_warm_s, window_s=config.pair_s))


def _lone_row(
    config: Config, run_name: str, number: int, server: Server, servers: list[Server]
) -> dict[str, Any]:
    used_s = _idle_cpu_s(server, servers)
    # The three runs of a pair send the same requests.
    phase = _lone_phase(config, server, str(number))
    idle_s = _idle_cpu_s(server, servers) - used_s
    return {
        "part": "lone seat",
        "system": server.launch.name,
        "run": run_name,
        "round": number,
        "tok_s": phase.output_tok_s(LIGHT.name),
        **_common(phase, idle_s / (config.pair_warm_s + config.pair_s)),
    }


def _common(phase: Phase, idle_server_cores: float) -> dict[str, Any]:
    return {
        "window_s": phase.window_s,
        "total_tok_s": sum(phase.output_tok_s(name) for name in phase.served),
        "errors": sum(record.error is not None for record in phase.records),
        "max_lag_s": phase.max_lag_s,
        "idle_server_cores": idle_server_cores,
    }


def _idle_cpu_s(busy: Server, servers: list[Server]) -> float:
    return sum(server.cpu_s() for server in servers if server is not busy)


def pair_ratios(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Of each triple: ours over the mean of its plain runs, and the later plain run over the earlier."""
    ours, control = [], []
    for number in sorted({row["round"] for row in rows}):
        tok_s = {row["run"]: row["tok_s"] for row in rows if row["round"] == number}
        if len(tok_s) == 3 and tok_s["before"] > 0 and tok_s["after"] > 0:
            ours.append(tok_s["ours"] / ((tok_s["before"] + tok_s["after"]) / 2))
            control.append(tok_s["after"] / tok_s["before"])
    return ours, control


def summarize(config: dict[str, Any], rows: list[dict[str, Any]]) -> Result:
    """The figures of all rounds and pairs."""
    seed = config["seed"]
    figures: dict[str, Any] = {"shares": {}}
    tables: list[Table] = []
    checks: list[Check] = []
    notes: list[str] = []
    share_rows = [row for row in rows if row["part"] == "shares"]
    if share_rows:
        estimates = _share_estimates(config["cases"], share_rows, seed)
        figures["shares"] = {
            f"{system}, {case}": asdict(estimate) for (system, case), estimate in estimates.items()
        }
        tables.append(_share_table(estimates, share_rows))
        checks += [
            Check(
                f"two backlogged seats, {case}: service per weight equal within {TOLERANCE:.0%}",
                str(estimate),
                estimate.low >= 1 - TOLERANCE and estimate.high <= 1 + TOLERANCE,
            )
            for (system, case), estimate in estimates.items()
            if system == SEATS
        ]
    lone_rows = [row for row in rows if row["part"] == "lone seat"]
    ours, control = pair_ratios(lone_rows)
    if ours:
        lone, spread = median_estimate(ours, seed), median_estimate(control, seed)
        figures["lone_seat_over_plain"], figures["plain_over_plain"] = asdict(lone), asdict(spread)
        figures["lone_ratios"], figures["control_ratios"] = ours, control
        tables.append(_lone_table(lone, spread, lone_rows))
        checks.append(
            Check(
                f"a lone seat's throughput over plain vLLM's at least {LONE_TARGET:.2f}",
                f"{lone} over {lone.samples} pairs (plain over plain: {spread})",
                lone.low >= LONE_TARGET,
            )
        )
        if not spread.high - spread.low <= _STEADY:
            notes.append(
                f"plain vLLM against itself came out at {spread}: too unsteady for a claim of a few %"
            )
    errors = sum(row["errors"] for row in rows)
    checks.append(Check("no failed request", f"{errors} failed", errors == 0))
    return Result(
        scenario="fairness",
        config=config,
        figures=figures,
        tables=tuple(tables),
        checks=tuple(checks),
        rows=rows,
        notes=(*instrument_notes(rows), *notes),
    )


Estimates = dict[tuple[str, str], Estimate]


def _share_estimates(cases: list[str], rows: list[dict[str, Any]], seed: int) -> Estimates:
    return {
        (system, case): median_estimate(
            [row["ratio"] for row in rows if row["system"] == system and row["case"] == case], seed
        )
        for case in cases
        for system in (PLAIN, SEATS)
    }


def _share_table(estimates: Estimates, rows: list[dict[str, Any]]) -> Table:
    def total_tok_s(system: str, case: str) -> float:
        return median([r["total_tok_s"] for r in rows if r["system"] == system and r["case"] == case])

    return Table(
        title="Two backlogged seats: first seat's service per weight over the second's (1 is fair)",
        columns=("case", "system", "rounds", "median", "95 % low", "high", "total tok/s"),
        rows=tuple(
            (
                case,
                system,
                str(estimate.samples),
                *(f"{figure:.3f}" for figure in (estimate.value, estimate.low, estimate.high)),
                f"{total_tok_s(system, case):,.0f}",
            )
            for (system, case), estimate in estimates.items()
        ),
    )


def _lone_table(lone: Estimate, spread: Estimate, rows: list[dict[str, Any]]) -> Table:
    def tok_s(*runs: str) -> str:
        return f"{median([row['tok_s'] for row in rows if row['run'] in runs]):,.0f}"

    return Table(
        title="One seat alone on the node: throughput against plain vLLM, by pairs",
        columns=("ratio", "pairs", "median", "95 % low", "high", "tok/s", "plain tok/s"),
        rows=tuple(
            (
                name,
                str(estimate.samples),
                *(f"{figure:.3f}" for figure in (estimate.value, estimate.low, estimate.high)),
                rate,
                tok_s("before", "after"),
            )
            for name, estimate, rate in (
                ("with seats / plain", lone, tok_s("ours")),
                ("plain / plain (control)", spread, tok_s("after")),
            )
        ),
    )


def plot(result: Result, figure: Figure) -> None:
    """Left: shares of two seats. Right: every pair of the lone seat, with the control beside it."""
    figure.suptitle("Two seats' shares of a full engine, and one seat's throughput alone, against plain vLLM")
    shares, lone = figure.subplots(1, 2)
    _plot_shares(shares, result)
    _plot_lone(lone, result)


def _plot_shares(axes: Axes, result: Result) -> None:
    cases = result.config["cases"]
    for place, system in enumerate((PLAIN, SEATS)):
        for position, case in enumerate(cases):
            ratios = [
                row["ratio"]
                for row in result.rows
                if row["part"] == "shares" and row["system"] == system and row["case"] == case
            ]
            if not ratios:
                continue
            axes.bar(position + 0.38 * place, median(ratios), 0.36, color=COLORS[system], label=system)
            axes.text(
                position + 0.38 * place, median(ratios), f"{median(ratios):.2f}", ha="center", va="bottom"
            )
            axes.plot([position + 0.38 * place] * len(ratios), ratios, "k.", markersize=4, label="one round")
    axes.axhspan(
        1 - TOLERANCE, 1 + TOLERANCE, color="green", alpha=0.2, label=f"fair, within {TOLERANCE:.0%}"
    )
    axes.set_xticks(
        [position + 0.19 for position in range(len(cases))], [case.replace(", ", "\n") for case in cases]
    )
    axes.set(title="Two backlogged seats", ylabel="first seat's service per weight / second's")
    axes.margins(y=0.15)
    _legend_once(axes)


def _plot_lone(axes: Axes, result: Result) -> None:
    groups = (
        ("with seats / plain", "lone_ratios", "lone_seat_over_plain", COLORS[SEATS]),
        ("plain / plain\n(control)", "control_ratios", "plain_over_plain", COLORS[PLAIN]),
    )
    for place, (_, ratios, estimate_name, color) in enumerate(groups):
        if ratios not in result.figures:
            continue
        estimate = result.figures[estimate_name]
        axes.plot(
            [place] * len(result.figures[ratios]),
            result.figures[ratios],
            "o",
            color=color,
            alpha=0.5,
            label="one pair",
        )
        # Too few pairs have a median and no interval (NaN), which is drawn as none.
        below, above = estimate["value"] - estimate["low"], estimate["high"] - estimate["value"]
        axes.errorbar(
            place + 0.12,
            estimate["value"],
            [[below], [above]],
            fmt="ks",
            capsize=5,
            label="median, 95 % interval",
        )
        axes.text(place + 0.16, estimate["value"], f"{estimate['value']:.3f}", va="center")
    axes.axhline(LONE_TARGET, color="red", linestyle="--", label=f"target {LONE_TARGET:.2f}")
    axes.set_xticks(range(len(groups)), [group[0] for group in groups])
    axes.set_xlim(-0.5, 1.6)
    axes.set(title="One seat alone", ylabel="ratio of output tokens per second")
    _legend_once(axes)


def _legend_once(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        axes.legend(unique.values(), unique.keys(), fontsize=8)
