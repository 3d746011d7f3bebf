"""Row *suites*: two workloads of the VTC paper (Sheng et al., OSDI 2024) on the real engine.

`overload`: two clients that both send more than half of what the machine can serve, one twice as much as the
other. `proportional`: three clients of which two send less than a third. Prompts and answers of 256 tokens;
the paper's rates, scaled by what plain vLLM serves of such requests here over what the paper's machine did.

The *gap* is the paper's: the largest less the smallest service (input + 2 * output) since the window began.
It is measured by `2U`, what VTC guarantees for two backlogged clients: `U` is 2 for each token that the
engine holds, here of as many requests as it has slots. `overload` is measured in rounds, as its gap swings.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.estimates import median_estimate, percentile
from benchmarks.guarantee.bench import Bench, Part, Row, Rows, some, tell
from benchmarks.guarantee.config import Config
from benchmarks.guarantee.isolation import waited_s
from benchmarks.guarantee.shares import services
from benchmarks.load import ClosedLoop, Lengths, Paced
from benchmarks.report import COLORS, PLAIN, SEATS, Check, Table
from benchmarks.seats import Seat
from benchmarks.servers import Server

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATES: dict[str, tuple[float, ...]] = {"overload": (1.5, 3.0), "proportional": (0.25, 0.5, 1.5)}
"""The paper's requests per second, by client."""
PAPER_REQUESTS_S = 1.74
"""What its A10G served of such requests per second."""
TOKENS = 256
TARGET = 0.05
_DRAIN_S = 2.0
_CALIBRATION_S = 20.0
"""Three waves of requests: all that begin together would be decoding in a shorter window."""


def seconds(config: Config) -> float:
    each_s = config.suites_warm_s + config.suites_s + _DRAIN_S
    return config.suites_warm_s + _CALIBRATION_S + 2 * len(_turns(config)) * each_s


def measure(bench: Bench) -> Rows:
    config = bench.config
    most = max(map(len, RATES.values()))
    clients = [Seat(f"client{number}") for number in range(most)]
    bench.sell(clients, config.easy_guarantee_tok_s)
    turns = _turns(config)
    tell(bench, "suites", 0, len(turns), "plain vLLM, what it can serve")
    full, _ = bench.phase(
        bench.plain,
        [
            ClosedLoop(
                clients[0].name,
                bench.target(bench.plain, clients[0]),
                config.max_num_seqs,
                Lengths(TOKENS, TOKENS),
                Lengths(TOKENS, TOKENS),
                f"{config.seed}/suites",
            )
        ],
        window_s=_CALIBRATION_S,
        warm_s=config.suites_warm_s,
    )
    scale = some(full.output_tok_s(clients[0].name)) / TOKENS / PAPER_REQUESTS_S
    rows = []
    for number, (name, round_number) in enumerate(turns, 1):
        for server in (bench.plain, bench.seats):
            tell(bench, "suites", number, len(turns), f"{server.launch.name}, {name}")
            row = _phase(bench, server, name, f"{name}/{round_number}", clients[: len(RATES[name])], scale)
            rows.append({**row, "round": round_number})
    return rows


def _turns(config: Config) -> list[tuple[str, int]]:
    """The suite and the round of each turn of the two servers."""
    rounds = {"overload": config.overload_rounds, "proportional": 1}
    return [(name, number) for name, count in rounds.items() for number in range(1, count + 1)]


def _phase(
    bench: Bench, server: Server, name: str, round_name: str, seats: list[Seat], scale: float
) -> dict[str, Any]:
    config = bench.config
    rates = [scale * rate for rate in RATES[name]]
    clients = [
        Paced(
            seat.name,
            bench.target(server, seat),
            1 / rate,
            Lengths(TOKENS, TOKENS),
            Lengths(TOKENS, TOKENS),
            f"{config.seed}/suites/{round_name}",
            pacing="fixed",
            max_requests=100_000,
            awaited=False,
        )
        for seat, rate in zip(seats, rates, strict=True)
    ]
    names = [seat.name for seat in seats]
    phase, common = bench.phase(
        server,
        clients,
        window_s=config.suites_s,
        warm_s=config.suites_warm_s,
        sample_s=1.0,
        refusable=names,
        drain_s=_DRAIN_S,
    )
    waits = {each: [waited_s(record) for record in phase.of(each)] for each in names}
    return {
        "row": "suites",
        **common,
        "suite": name,
        "requests_s": rates,
        "service": services(phase, names),
        "ttft_s": {each: [s for s in found if s is not None] for each, found in waits.items()},
        "refused": sum(record.status == 503 for record in phase.records),
    }


def gaps(service: list[dict[str, float]]) -> list[tuple[float, float]]:
    """At each sample: the moment, and the largest less the smallest service since the first one."""
    first = service[0]
    return [
        (sample["at_s"], max(gained) - min(gained))
        for sample in service
        if (gained := [sample[name] - first[name] for name in sample if name != "at_s"])
    ]


def largest_gap(row: dict[str, Any]) -> float:
    """The largest gap of a phase."""
    return max(gap for _, gap in gaps(row["service"]))


def summarize(config: dict[str, Any], rows: Rows) -> Part:
    bound = 2 * 2 * config["max_num_seqs"] * 2 * TOKENS
    overload = [row for row in rows if row["suite"] == "overload"]
    gap = {
        system: median_estimate(
            [largest_gap(row) / bound for row in overload if row["system"] == system], config["seed"]
        )
        for system in (PLAIN, SEATS)
    }
    return Part(
        figures={"overload_gap_of_2u": {system: asdict(estimate) for system, estimate in gap.items()}},
        tables=(_table(rows, bound),),
        checks=(
            Check(
                f"suites: the VTC paper's overload, accumulated gap at most {TARGET} of 2U",
                f"{gap[SEATS]} over {gap[SEATS].samples} rounds, plain vLLM {gap[PLAIN].value:.3f}",
                gap[SEATS].high <= TARGET,
            ),
        ),
    )


def _table(rows: Rows, bound: float) -> Table:
    def line(row: dict[str, Any]) -> tuple[str, ...]:
        waits_ms = [f"{1000 * percentile(waits, 0.99):,.0f}" for waits in row["ttft_s"].values()]
        return (
            f"{row['suite']} {row['round']}, {row['system']}",
            " ".join(f"{rate:.1f}" for rate in row["requests_s"]),
            f"{largest_gap(row) / bound:.3f}",
            " / ".join(waits_ms),
            str(row["refused"]),
            f"{row['total_tok_s']:,.0f}",
        )

    return Table(
        title="Workloads of the VTC paper, 256 tokens in and out",
        columns=("suite", "requests/s", "gap of 2U", "TTFT p99 ms by client", "refused", "tok/s"),
        rows=tuple(line(row) for row in rows),
    )


def plot(axes: Axes, rows: Rows, _part: Part) -> None:
    """The gap over time."""
    for row in rows:
        style = "-" if row["suite"] == "overload" else ":"
        moments, values = zip(*gaps(row["service"]), strict=True)
        # One entry of the legend for all rounds.
        label = f"{row['suite']}, {row['system']}" if row["round"] == 1 else None
        axes.plot(moments, values, style, color=COLORS[row["system"]], label=label)
    axes.set(title="The VTC paper's workloads", xlabel="s", ylabel="accumulated gap of service")
    axes.legend(fontsize=8)


ROW = Row(
    "suites",
    "two workloads of the VTC paper, scaled to the machine",
    seconds,
    measure,
    summarize,
    plot,
)
