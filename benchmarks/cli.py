"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from matplotlib.figure import Figure

from benchmarks import fairness, gpu, guarantee, noisy_neighbour, report
from benchmarks.servers import ServerStartError

_EXAMPLES = """\
examples:
  boosts bench noisy-neighbour
      a quiet seat beside 64 noisy streams, our node and plain vLLM in turns, about 6 minutes
  boosts bench noisy-neighbour --quick
      the same in one short round: shows the shape, proves nothing
  boosts bench fairness --rounds 0 --pairs 20
      only the lone seat's throughput against plain vLLM, in 20 pairs
  boosts bench fairness --rounds 0 --lone-connections 64
      the same with as many streams as slots
  boosts bench guarantee
      every promise of the scheduler against a real vLLM, row by row, about 90 minutes
  boosts bench guarantee --only pace,isolation
      only these rows; --quick shows in a few minutes that they work, and proves nothing
  boosts bench gpu
      the rows that need a GPU to mean something, with Qwen3-8B and dummy weights, about half an hour
  boosts bench gpu --only total,lone,step-time
      these rows, about 10 minutes

`boosts bench` builds the demo model when no --model is given; `python -m benchmarks` needs one; gpu has
its own and takes none.

Results go to --out: result.json with every row, the table, a picture, the servers' logs; guarantee and
gpu write the first two anew after each row, so that a run that ends early leaves them. Exit status: 0 when
every target is met, or where gpu finds no GPU; 1 when one is not, 2 when a server did not start or serve,
130 after Ctrl-C.
"""

Ran = tuple[report.Result, Callable[[report.Result, Figure], None]]


def main(argv: list[str]) -> int:
    """Parse, run, report. Progress goes to stderr, the table to stdout."""
    arguments = _parser().parse_args(argv)
    if arguments.scenario == "gpu" and (reason := gpu.missing_gpu()):
        print(f"skipped: {reason}")
        return 0
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    home = Path(os.environ.get("BOOSTS_HOME", "var"))
    folder = arguments.out or home / "bench" / f"{arguments.scenario}-{stamp}"
    folder.mkdir(parents=True, exist_ok=True)
    report.code()
    # A terminated benchmark stops its servers as an interrupted one does.
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        result, plot = _SCENARIOS[arguments.scenario](arguments, folder)
    except (ServerStartError, guarantee.NothingServedError) as failure:
        print(failure, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the servers are stopped", file=sys.stderr)
        return 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    written = report.write(result, folder, plot)
    print(f"\n{result}\n")
    for path in written:
        print(f"written: {path}")
    return 0 if all(check.met for check in result.checks) else 1


def _noisy_neighbour(arguments: argparse.Namespace, folder: Path) -> Ran:
    config = noisy_neighbour.Config(
        model=arguments.model,
        folder=folder,
        rounds=arguments.rounds,
        phase_s=arguments.phase_s,
        max_num_seqs=arguments.max_num_seqs,
        noisy_streams=arguments.noisy_streams,
        seed=arguments.seed,
    )
    if arguments.quick:
        config = replace(config, rounds=1, phase_s=8.0, warm_s=2.0, quiet_interval_s=0.4)
    return noisy_neighbour.run(config, _Clock().say), noisy_neighbour.plot


def _fairness(arguments: argparse.Namespace, folder: Path) -> Ran:
    config = fairness.Config(
        model=arguments.model,
        folder=folder,
        rounds=arguments.rounds,
        pairs=arguments.pairs,
        max_num_seqs=arguments.max_num_seqs,
        lone_connections=arguments.lone_connections,
        seed=arguments.seed,
    )
    if arguments.quick:
        config = replace(
            config, rounds=min(1, config.rounds), share_s=8.0, pairs=min(2, config.pairs), pair_s=4.0
        )
    return fairness.run(config, _Clock().say), fairness.plot


def _guarantee(arguments: argparse.Namespace, folder: Path) -> Ran:
    config = guarantee.Config(
        model=arguments.model,
        folder=folder,
        only=arguments.only,
        pace_rounds=arguments.pace_rounds,
        starts=arguments.starts,
        pairs=arguments.pairs,
        max_num_seqs=arguments.max_num_seqs,
        seed=arguments.seed,
    )
    if arguments.quick:
        config = config.quick()
    return guarantee.run(config, _Clock().say), guarantee.plot


def _gpu(arguments: argparse.Namespace, folder: Path) -> Ran:
    config = replace(gpu.gpu_config(folder), only=arguments.only)
    if arguments.quick:
        config = config.quick()
    return gpu.run(config, _Clock().say), guarantee.plot


_SCENARIOS: dict[str, Callable[[argparse.Namespace, Path], Ran]] = {
    "noisy-neighbour": _noisy_neighbour,
    "fairness": _fairness,
    "guarantee": _guarantee,
    "gpu": _gpu,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="boosts bench",
        description="Measure vLLM with seats against plain vLLM, in turns on one machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scenarios = parser.add_subparsers(dest="scenario", required=True, metavar="SCENARIO")
    noisy = scenarios.add_parser(
        "noisy-neighbour", help="a quiet seat alone, then beside many random-length streams of another"
    )
    _common_options(noisy)
    noisy.add_argument("--phase-s", type=_positive, help="seconds per phase (default %(default)s)")
    noisy.add_argument("--noisy-streams", type=int, help="open noisy streams (default %(default)s)")
    noisy.set_defaults(**_defaults(noisy_neighbour.Config))
    fair = scenarios.add_parser(
        "fairness", help="two backlogged seats' shares, and a lone seat's throughput against plain vLLM"
    )
    _common_options(fair)
    fair.add_argument("--pairs", type=int, help="lone-seat pairs, 0 for none (default %(default)s)")
    fair.add_argument("--lone-connections", type=int, help="the lone seat's streams (default %(default)s)")
    fair.set_defaults(**_defaults(fairness.Config))
    promises = scenarios.add_parser(
        "guarantee",
        help="every promise of the scheduler, a row each: " + ", ".join(guarantee.ROWS),
        epilog="rows:\n" + "\n".join(f"  {name:<10} {row.about}" for name, row in guarantee.ROWS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _common_options(promises, rounds=False)
    _only(promises, guarantee.ROWS)
    promises.add_argument(
        "--pace-rounds", type=_count, help="of pace; 26 s each on the node (default %(default)s)"
    )
    promises.add_argument(
        "--starts",
        type=_starts,
        help="of both servers, for total and lone: 1, or 3 and more (default %(default)s)",
    )
    promises.add_argument(
        "--pairs", type=_count, help="of total and lone, on each start (default %(default)s)"
    )
    promises.set_defaults(**_defaults(guarantee.Config))
    on_gpu = scenarios.add_parser(
        "gpu", help="the rows of guarantee that need a GPU to mean something, with Qwen3-8B"
    )
    _run_options(on_gpu)
    _only(on_gpu, gpu.ROWS)
    on_gpu.set_defaults(only=gpu.ROWS)
    return parser


def _defaults(config: type[noisy_neighbour.Config | fairness.Config | guarantee.Config]) -> dict[str, Any]:
    """The scenario's own defaults, so that the command line cannot say otherwise."""
    return {field.name: field.default for field in fields(config) if field.default is not MISSING}


def _common_options(parser: argparse.ArgumentParser, *, rounds: bool = True) -> None:
    _run_options(parser)
    parser.add_argument("--model", required=True, help="model folder or Hugging Face id")
    if rounds:
        parser.add_argument("--rounds", type=int, help="rounds (default %(default)s)")
    parser.add_argument("--max-num-seqs", type=int, help="the engine's slots (default %(default)s)")
    parser.add_argument("--seed", type=int, help="of lengths, pauses, intervals (default %(default)s)")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="results folder (default var/bench/<scenario>-<UTC time>)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few short rounds, to see that it works; overrides options of rounds and seconds",
    )


def _only(parser: argparse.ArgumentParser, rows: Collection[str]) -> None:
    def chosen(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        unknown = [name for name in names if name not in rows]
        if unknown:
            raise argparse.ArgumentTypeError(f"no such row: {', '.join(unknown)}; have {', '.join(rows)}")
        return names

    parser.add_argument("--only", type=chosen, metavar="ROW,...", help=f"of {', '.join(rows)}: these alone")


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _starts(text: str) -> int:
    value = _count(text)
    if value == 2:
        raise argparse.ArgumentTypeError("two starts give no interval; must be 1, or 3 and more")
    return value


class _Clock:
    """Progress lines that begin with the seconds since the benchmark began."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", file=sys.stderr, flush=True)


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    # Once: a second signal would cut the stopping of the servers short and leave one behind.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
