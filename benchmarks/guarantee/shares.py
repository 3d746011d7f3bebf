"""Rows *shares* and *flood*: backlogged seats are served in proportion to their quantity, and to nothing
else.

*Shares*: four seats of quantity 1 to 4, each with more requests waiting than the engine has slots, for
minutes. *Flood*: two equal seats, one with many more connections than the other; plain vLLM is shown
once for contrast.

Service is what the fair queue charges: input tokens + 2 * output tokens, as the clients received them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.estimates import median_estimate
from benchmarks.guarantee.bench import Bench, Part, Row, Rows, tell
from benchmarks.guarantee.config import Config
from benchmarks.load import Phase
from benchmarks.report import COLORS, PLAIN, SEATS, Check, Table
from benchmarks.seats import Seat
from benchmarks.servers import Server

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WEIGHTED = tuple(Seat(f"of {quantity}", quantity) for quantity in (1, 2, 3, 4))
FLOODING, STEADY = Seat("flooding"), Seat("steady")
RUN_TOLERANCE, WINDOW_TOLERANCE, FLOOD_TOLERANCE = 0.01, 0.05, 0.05
WINDOW_S = 60.0
_SAMPLE_S = 1.0


# --- shares by weight ---------------------------------------------------------------------------------


def _shares_seconds(config: Config) -> float:
    return config.shares_warm_s + config.shares_s


def _measure_shares(bench: Bench) -> Rows:
    config = bench.config
    bench.sell(WEIGHTED, config.easy_guarantee_tok_s)
    tell(bench, "shares", 1, 1, f"with seats, weights 1:2:3:4 for {config.shares_s:.0f} s")
    clients = [
        bench.crowd(bench.seats, seat, config.shares_connections, config.fair_output, "shares")
        for seat in WEIGHTED
    ]
    phase, common = bench.phase(
        bench.seats,
        clients,
        # So that there is a sample at both ends of the last window.
        window_s=config.shares_s + 2 * _SAMPLE_S,
        warm_s=config.shares_warm_s,
        sample_s=_SAMPLE_S,
    )
    return [{"row": "shares", **common, "service": services(phase, [seat.name for seat in WEIGHTED])}]


def services(phase: Phase, names: Sequence[str]) -> list[dict[str, float]]:
    """Each client's service so far at every sample within the measuring window, with the moment as `at_s`."""
    return [
        {"at_s": sample.at_s, **{name: sample.served[name].cost() for name in names}}
        for sample in phase.samples
        if phase.start_s <= sample.at_s <= phase.end_s
    ]


def deviations(service: Sequence[dict[str, float]], weights: dict[str, float]) -> dict[str, float]:
    """From the first sample to the last: each client's share over its due share, less 1.

    -1 for everybody where nobody was served.
    """
    gained = {name: service[-1][name] - service[0][name] for name in weights}
    total, weight = sum(gained.values()), sum(weights.values())
    if not total:
        return dict.fromkeys(weights, -1.0)
    return {name: gained[name] / total * weight / weights[name] - 1 for name in weights}


def windows(service: Sequence[dict[str, float]], window_s: float) -> list[list[dict[str, float]]]:
    """The samples of each whole window, both ends included; half a sample short counts as whole."""
    cut: list[list[dict[str, float]]] = []
    start = 0
    for place, sample in enumerate(service):
        if sample["at_s"] - service[start]["at_s"] >= window_s - _SAMPLE_S / 2:
            cut.append(list(service[start : place + 1]))
            start = place
    return cut


def _summarize_shares(_config: dict[str, Any], rows: Rows) -> Part:
    (row,) = rows
    weights = {seat.name: float(seat.quantity) for seat in WEIGHTED}
    run = deviations(row["service"], weights)
    by_window = [deviations(samples, weights) for samples in windows(row["service"], WINDOW_S)]
    worst_run = max(abs(deviation) for deviation in run.values())
    worst_window = max((abs(d) for window in by_window for d in window.values()), default=float("nan"))
    return Part(
        figures={"run": run, "windows": by_window, "worst_run": worst_run, "worst_window": worst_window},
        tables=(_shares_table(run, by_window, weights),),
        checks=(
            Check(
                f"shares: weights 1:2:3:4, every share within {RUN_TOLERANCE:.0%} of its due over the run",
                f"the worst is off by {worst_run:.2%} over {row['window_s']:.0f} s",
                worst_run <= RUN_TOLERANCE,
            ),
            Check(
                f"shares: within {WINDOW_TOLERANCE:.0%} in every window of {WINDOW_S:.0f} s",
                f"the worst of {len(by_window)} windows is off by {worst_window:.2%}"
                if by_window
                else "the run was shorter than a window",
                worst_window <= WINDOW_TOLERANCE,
            ),
        ),
    )


def _shares_table(
    run: dict[str, float], by_window: list[dict[str, float]], weights: dict[str, float]
) -> Table:
    total = sum(weights.values())
    return Table(
        title="Backlogged seats' shares of the service",
        columns=("seat", "due share", "share", "off by", "worst window"),
        rows=tuple(
            (
                name,
                f"{weight / total:.1%}",
                f"{(1 + run[name]) * weight / total:.2%}",
                f"{run[name]:+.2%}",
                f"{max((abs(window[name]) for window in by_window), default=float('nan')):.2%}",
            )
            for name, weight in weights.items()
        ),
    )


def _plot_shares(axes: Axes, rows: Rows, _part: Part) -> None:
    """Each seat's service per weight, over the run's mean, in windows of 10 s."""
    weights = {seat.name: float(seat.quantity) for seat in WEIGHTED}
    for seat in WEIGHTED:
        cut = windows(rows[0]["service"], 10.0)
        off = [100 * deviations(samples, weights)[seat.name] for samples in cut]
        axes.plot([samples[-1]["at_s"] for samples in cut], off, label=f"weight {seat.quantity}")
    axes.axhspan(-100 * WINDOW_TOLERANCE, 100 * WINDOW_TOLERANCE, color="green", alpha=0.15)
    axes.set(title="Shares by weight, windows of 10 s", xlabel="s", ylabel="off its due share by, %")
    axes.legend(fontsize=8)


# --- a flood of connections ---------------------------------------------------------------------------


def _flood_seconds(config: Config) -> float:
    return (config.flood_rounds + 1) * (2 * config.warm_s + config.flood_s)


def _measure_flood(bench: Bench) -> Rows:
    config = bench.config
    bench.sell([FLOODING, STEADY], config.easy_guarantee_tok_s)
    rows = []
    for number in range(1, config.flood_rounds + 1):
        for server in (bench.plain, bench.seats) if number == 1 else (bench.seats,):
            tell(bench, "flood", number, config.flood_rounds, server.launch.name)
            rows.append(_flood_row(bench, server, number))
    return rows


def _flood_row(bench: Bench, server: Server, number: int) -> dict[str, Any]:
    config = bench.config
    clients = [
        bench.crowd(server, seat, connections, config.fair_output, f"flood/{number}")
        for seat, connections in (
            (FLOODING, config.flood_connections),
            (STEADY, 2 * config.max_num_seqs),
        )
    ]
    phase, common = bench.phase(server, clients, window_s=config.flood_s, warm_s=2 * config.warm_s)
    flooding, steady = (phase.served[seat.name].cost() for seat in (FLOODING, STEADY))
    ratio = flooding / steady if steady else float("inf")
    return {"row": "flood", **common, "round": number, "ratio": ratio}


def _summarize_flood(config: dict[str, Any], rows: Rows) -> Part:
    ours = median_estimate([row["ratio"] for row in rows if row["system"] == SEATS], config["seed"])
    plain = median_estimate([row["ratio"] for row in rows if row["system"] == PLAIN], config["seed"])
    connections = f"{config['flood_connections']} connections against {2 * config['max_num_seqs']}"
    low, high = 1 - FLOOD_TOLERANCE, 1 + FLOOD_TOLERANCE
    return Part(
        figures={"ratio": asdict(ours), "plain_ratio": asdict(plain)},
        tables=(
            Table(
                title=f"Equal seats, {connections}: the flooding seat's service over the other's",
                columns=("system", "rounds", "ratio"),
                rows=((SEATS, str(ours.samples), str(ours)), (PLAIN, str(plain.samples), str(plain))),
            ),
        ),
        checks=(
            Check(
                f"flood: {connections}, service ratio {low:.2f} to {high:.2f}",
                f"{ours} over {ours.samples} rounds",
                ours.low >= low and ours.high <= high,
            ),
        ),
    )


def _plot_flood(axes: Axes, rows: Rows, _part: Part) -> None:
    """Every round's ratio."""
    for place, system in enumerate((PLAIN, SEATS)):
        ratios = [row["ratio"] for row in rows if row["system"] == system]
        axes.plot([place] * len(ratios), ratios, "o", color=COLORS[system])
    axes.axhspan(1 - FLOOD_TOLERANCE, 1 + FLOOD_TOLERANCE, color="green", alpha=0.15)
    axes.set_xticks([0, 1], [PLAIN, SEATS])
    axes.set_xlim(-0.5, 1.5)
    axes.set(title="A flood of connections", ylabel="flooding seat's service / the other's")


SHARES_ROW = Row(
    "shares",
    "backlogged seats of weights 1:2:3:4",
    _shares_seconds,
    _measure_shares,
    _summarize_shares,
    _plot_shares,
)
FLOOD_ROW = Row(
    "flood",
    "equal seats, one with many more connections",
    _flood_seconds,
    _measure_flood,
    _summarize_flood,
    _plot_flood,
)
