"""The command line of the simulator: `python -m benchmarks.simulator`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.simulator import paper, rows
from benchmarks.simulator.machines import LLAMA2_7B_A10G
from benchmarks.simulator.soak import soak
from benchmarks.simulator.workloads import read_trace

TRACE = Path(__file__).parent / "traces" / "vtc_arena_27clients.csv"

_EXAMPLES = """\
examples:
  python -m benchmarks.simulator rows
      the VTC paper's experiments, ours beside its policies; about 6 minutes on one core
  python -m benchmarks.simulator rows --quick
      the fit, the real trace and `overload` alone; about a minute
  python -m benchmarks.simulator soak --seeds 100000
      adversarial simulations of the scheduler, judged by the oracles; 1.5 to 4 hours, divided by the cores
  python -m benchmarks.simulator soak --first 466 --seeds 1
      one of them again
  python -m benchmarks.simulator fit --tries 100
      look for step times with which the published rows come out better

Progress goes to stderr, results to stdout and to --out. Exit status: 0 when every target is met and no
promise broken, 1 otherwise, 2 for a wrong call, 130 when it was stopped (what was seen is written).
"""


def main(argv: list[str]) -> int:
    """Parse, run, report; returns the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "fit":
        return _fit(arguments)
    folder: Path = arguments.out or _default_folder(arguments.command)
    folder.mkdir(parents=True, exist_ok=True)
    return _soak(arguments, folder) if arguments.command == "soak" else _rows(arguments, folder)


def _rows(arguments: argparse.Namespace, folder: Path) -> int:
    options = rows.Options(quick=arguments.quick)
    result, gaps = rows.simulate(read_trace(arguments.trace), options, _Clock().say)

    def plot(_result: report.Result, figure: Figure) -> None:
        _plot(gaps, result, figure)

    written = report.write(result, folder, plot)
    print(f"\n{result}\n")
    for path in written:
        print(f"written: {path}")
    return 0 if all(check.met for check in result.checks) else 1


def _soak(arguments: argparse.Namespace, folder: Path) -> int:
    found = soak(arguments.first, arguments.seeds, _Clock().say, arguments.jobs)
    path = folder / "soak.json"
    path.write_text(json.dumps({**found.summary(), "environment": report.environment()}, indent=1))
    print(f"{found.simulations} simulations from seed {found.first} in {found.seconds:.0f} s")
    print(
        f"held in {found.held}, preempted in {found.preempted}; a pace judged in {found.pace_judged}, with "
        f"something held in {found.pace_held} and on a machine that slowed down in {found.pace_slowed}; "
        f"a promise was broken in {found.broken_seeds}"
    )
    for line in found.broken:
        print(line)
    print(f"written: {path}")
    if found.simulations < found.asked:
        return 130
    return 1 if found.broken_seeds else 0


def _fit(arguments: argparse.Namespace) -> int:
    found = paper.fit(read_trace(arguments.trace), LLAMA2_7B_A10G, arguments.tries, _Clock().say)
    print(json.dumps(asdict(found), indent=1))
    return 0


def _plot(gaps: dict[str, list[tuple[float, float]]], result: report.Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for policy, points in gaps.items():
        if policy != "FCFS":  # it would flatten the others
            left.plot(*zip(*points, strict=True), marker="o", label=policy)
    left.axhline(rows.GAP_TARGET, color="black", linestyle=":", label="target")
    left.set(title="overload, uniform lengths", xlabel="s", ylabel="accumulated gap, cost units")
    left.set_ylim(0, 1.25 * left.get_ylim()[1])  # the legend stands above the points
    left.legend(loc="upper center", ncols=3)
    arena = [row for row in result.rows if row["workload"] == "arena"]
    names = [f"{row['policy']}\n{row['engine']}" for row in arena]
    right.bar(names, [row["max_diff"] for row in arena])
    right.axhline(rows.DIFF_TARGET, color="black", linestyle=":", label="VTC as published")
    right.set(title="real trace", ylabel="largest difference, cost units/s")
    right.legend()
    report.label_bars(right, "%.0f")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulator",
        description="Simulate a node: the VTC paper's experiments, and adversaries against the scheduler.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    experiments = commands.add_parser("rows", help="the VTC paper's experiments, ours beside its policies")
    experiments.add_argument("--quick", action="store_true", help="the real trace and `overload` alone")
    adversaries = commands.add_parser("soak", help="adversarial simulations, judged by the oracles")
    adversaries.add_argument("--first", type=int, default=0, help="first seed (default %(default)s)")
    adversaries.add_argument(
        "--seeds", type=_positive, default=100_000, help="how many (default %(default)s)"
    )
    adversaries.add_argument(
        "--jobs", type=_positive, default=os.cpu_count() or 1, help="processes (default %(default)s)"
    )
    fit = commands.add_parser("fit", help="fit the step times to the published rows")
    fit.add_argument("--tries", type=_positive, default=100, help="(default %(default)s)")
    for command in (experiments, fit):
        command.add_argument("--trace", type=Path, default=TRACE, help="the real trace (default %(default)s)")
    for command in (experiments, adversaries):
        command.add_argument("--out", type=Path, help="results folder (default var/bench/...)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _default_folder(command: str) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return Path(os.environ.get("BOOSTS_HOME", "var")) / "bench" / f"simulator-{command}-{stamp}"


class _Clock:
    """Progress lines that begin with the seconds since the run began."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
