"""Rows *total* and *lone*: where no pace is in danger, the machine's total is plain vLLM's.

Each is a chain of phases plain, ours, plain, ours, ..., plain. Each of ours gives one ratio against the
mean of its two neighbours; neighbouring plain phases against each other are the control. It shows how steady
one process is within a chain, and not how processes differ. Each phase sends requests of its own: of the same
again and again plain vLLM, which reads them the same way each time, would meet half of the batch sizes, and
oneDNN's cache would hold those. The first two, in which the servers meet that load, are kept and not counted:
in the beginning most are slower.

A chain is measured on each of several starts of both servers, and the figure is the mean over the starts:
its interval says what another start would bring. Where a run has a single start it is the mean of the chain's
ratios, and the interval holds for these two processes alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.estimates import Estimate, mean_estimate, median
from benchmarks.guarantee.bench import Bench, Part, Row, Rows, some, tell
from benchmarks.guarantee.config import Config
from benchmarks.load import Client
from benchmarks.report import COLORS, PLAIN, SEATS, Check, Table
from benchmarks.seats import Seat
from benchmarks.servers import Server

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWED, CROWD, LONE = Seat("owed"), Seat("crowd"), Seat("lone")
IDLE = tuple(Seat(f"idle-{number}") for number in range(1, 5))
"""Sold, and using nothing: a node must be ready for them at no cost to the one who is there."""
TOTAL_TARGET, LONE_TARGET = 0.97, 0.98

_UNCOUNTED = 2
"""Phases at the beginning of a chain."""
_STEADY, _STEADY_START = 0.04, 0.1
"""Widest interval of the control with which the figure means something: over several starts; of a single one,
whose chain has few links."""

Clients = Callable[[Server, str], list[Client]]


def _links(config: Config) -> int:
    return _UNCOUNTED + 2 * config.pairs + 1


def _chain_seconds(config: Config) -> float:
    return _links(config) * (config.pair_warm_s + config.pair_s)


def _chain(bench: Bench, row: str, case: str, clients: Clients) -> Rows:
    """Plain, ours, plain, ..., plain, numbered by `link`; those that count from 0 on."""
    config = bench.config
    rows = []
    for link in range(-_UNCOUNTED, 2 * config.pairs + 1):
        server = bench.seats if link % 2 else bench.plain
        tell(bench, row, link + 1 + _UNCOUNTED, _links(config), f"{server.launch.name}, {case}")
        _, common = bench.phase(
            server,
            clients(server, f"{row}/{case}/{link}"),
            window_s=config.pair_s,
            warm_s=config.pair_warm_s,
        )
        rows.append({"row": row, "case": case, "link": link, **common})
    return rows


# --- no pace in danger --------------------------------------------------------------------------------


def _total_seconds(config: Config) -> float:
    return _chain_seconds(config) + config.warm_s + config.calibration_s


def _measure_total(bench: Bench) -> Rows:
    config = bench.config

    def clients(server: Server, round_name: str) -> list[Client]:
        return [
            bench.owed_stream(server, OWED, round_name),
            bench.crowd(server, CROWD, config.noisy_streams, config.noisy_output, round_name),
        ]

    phase, _ = bench.phase(bench.plain, clients(bench.plain, "easy"), window_s=config.calibration_s)
    bench.sell([OWED, CROWD, *IDLE], config.easy_times * some(phase.output_tok_s(OWED.name)))
    return _chain(bench, "total", f"a seat and a crowd of {config.noisy_streams}", clients)


def _summarize_total(config: dict[str, Any], rows: Rows) -> Part:
    return _summary(config, rows, TOTAL_TARGET, "total: no pace in danger,")


# --- a lone seat --------------------------------------------------------------------------------------


def _lone_seconds(config: Config) -> float:
    return 2 * _chain_seconds(config)


def _measure_lone(bench: Bench) -> Rows:
    config = bench.config
    bench.sell([LONE, *IDLE], config.easy_guarantee_tok_s)
    rows: Rows = []
    for case, streams in _lone_cases(config).items():

        def clients(server: Server, round_name: str, streams: int = streams) -> list[Client]:
            return [bench.crowd(server, LONE, streams, config.noisy_output, round_name)]

        rows += _chain(bench, "lone", case, clients)
    return rows


def _lone_cases(config: Config) -> dict[str, int]:
    return {
        f"{streams} streams on {config.max_num_seqs} slots": streams
        for streams in (config.lone_streams, config.lone_many_streams)
    }


def _summarize_lone(config: dict[str, Any], rows: Rows) -> Part:
    return _summary(config, rows, LONE_TARGET, "lone seat:")


# --- what both make of their rows ---------------------------------------------------------------------


def link_ratios(rows: Rows) -> tuple[list[float], list[float]]:
    """Of one chain: each of ours over the mean of its neighbours, and these against each other."""
    total = {row["link"]: row["total_tok_s"] for row in rows if row["total_tok_s"] > 0 or row["link"] % 2}
    middles = [link for link in sorted(total) if link % 2 and link - 1 in total and link + 1 in total]
    return (
        [total[link] / ((total[link - 1] + total[link + 1]) / 2) for link in middles],
        [total[link + 1] / total[link - 1] for link in middles],
    )


def _by_start(rows: Rows) -> list[tuple[list[float], list[float]]]:
    """The ratios and the controls of each start's chain that has any."""
    starts = dict.fromkeys(row["start"] for row in rows)
    chains = [link_ratios([row for row in rows if row["start"] == start]) for start in starts]
    return [chain for chain in chains if chain[0]]


def _samples(chains: Sequence[list[float]], starts: int) -> list[float]:
    """The mean of each start's chain; of a run with a single start, the chain."""
    if starts == 1:
        return [ratio for chain in chains for ratio in chain]
    return [statistics.fmean(chain) for chain in chains]


def _summary(config: dict[str, Any], rows: Rows, target: float, about: str) -> Part:
    figures: dict[str, Any] = {}
    lines, checks, notes = [], [], []
    for case in dict.fromkeys(row["case"] for row in rows):
        whole = [row for row in rows if row["case"] == case]
        of_case = [row for row in whole if row["link"] >= 0]
        chains = _by_start(of_case)
        ratios, controls = [chain for chain, _ in chains], [chain for _, chain in chains]
        samples, control_samples = (_samples(each, config["starts"]) for each in (ratios, controls))
        ours, control = mean_estimate(samples), mean_estimate(control_samples)
        figures[case] = {
            "total_over_plain": asdict(ours),
            "plain_over_plain": asdict(control),
            "ratios": ratios,
            "controls": controls,
            "samples": samples,
            "control_samples": control_samples,
            "uncounted": [first for first, _ in _by_start([row for row in whole if row["link"] <= 0])],
        }
        lines.append(_line(case, len(ratios), ours, control, of_case))
        checks.append(
            Check(
                f"{about} {case}: throughput over plain vLLM's at least {target:.2f}",
                f"{ours} over {_counted(ratios)} (plain over plain: {control})",
                ours.low >= target,
            )
        )
        if control.high - control.low > (_STEADY if config["starts"] > 1 else _STEADY_START):
            notes.append(f"{case}: plain vLLM against itself came out at {control}: too unsteady")
    title = f"Throughput against plain vLLM's ({about.rstrip(':,')})"
    columns = ("case", "starts", "mean", "95 % low", "high", "plain/plain", "tok/s", "plain tok/s")
    return Part(figures, (Table(title, columns, tuple(lines)),), tuple(checks), tuple(notes))


def _counted(chains: Sequence[list[float]]) -> str:
    pairs = f"{sum(map(len, chains))} pairs"
    return f"{pairs} of one start" if len(chains) == 1 else f"{len(chains)} starts, {pairs}"


def _line(case: str, starts: int, ours: Estimate, control: Estimate, rows: Rows) -> tuple[str, ...]:
    def tok_s(system: str) -> str:
        return f"{median([row['total_tok_s'] for row in rows if row['system'] == system]):,.0f}"

    figures = (ours.value, ours.low, ours.high, control.value)
    return (case, str(starts), *(f"{figure:.3f}" for figure in figures), tok_s(SEATS), tok_s(PLAIN))


def _plot(target: float, title: str) -> Callable[[Axes, Rows, Part], None]:
    def plot(axes: Axes, _rows: Rows, part: Part) -> None:
        """A point per start, or per pair of a single one, with the control beside it."""
        for place, figures in enumerate(part.figures.values()):
            for offset, key, color, name in (
                (-0.12, "samples", COLORS[SEATS], "ours / plain"),
                (0.12, "control_samples", COLORS[PLAIN], "plain / plain (control)"),
            ):
                ratios = figures[key]
                places = [place + offset] * len(ratios)
                axes.plot(places, ratios, "o", color=color, alpha=0.5, label=None if place else name)
        axes.axhline(target, color="red", linestyle="--", label=f"target {target:.2f}")
        axes.set(
            title=title, ylabel="ratio of output tokens per second", xlim=(-0.5, len(part.figures) - 0.5)
        )
        axes.set_xticks(range(len(part.figures)), list(part.figures))
        axes.legend(fontsize=8)

    return plot


TOTAL_ROW = Row(
    "total",
    "the total where no pace is in danger",
    _total_seconds,
    _measure_total,
    _summarize_total,
    _plot(TOTAL_TARGET, "Total where no pace is in danger"),
    several_starts=True,
)
LONE_ROW = Row(
    "lone",
    "a lone seat's throughput, also when it wants every slot",
    _lone_seconds,
    _measure_lone,
    _summarize_lone,
    _plot(LONE_TARGET, "A lone seat"),
    several_starts=True,
)
