"""`boosts capacity`: what a node can do, measured in a few minutes.

Serving is started as a node runs it, with one seat that nothing is promised to. Long prompts alone give the
price of a prompt token; then closed loops of 1, 2, 4, ... streams, with short and with longer contexts, give
the time of a decode step. The step time fitted to them says how many seats can be sold with which guarantee.
The result is a `NodeCapacity`: the pool's `declaredCapacity`, and what the node's agent reports.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import re
import signal
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks.capacity_fit import Point, fit, offers, point, prefill_tok_s
from benchmarks.capacity_report import SHORT_PROMPT, Measured, report, write
from benchmarks.completions import Target
from benchmarks.load import ClosedLoop, Lengths, Phase, run_phase
from benchmarks.seats import Seat, write_entitlements
from benchmarks.servers import SERVED_NAME, Engine, Server, ServerStartError, running, seat_node
from contract.capacity import DEFAULT_CONTEXT_TOKENS, DEFAULT_MARGIN, NodeCapacity, Promise

_EXAMPLES = """\
examples:
  # the demo model on this machine, about three minutes
  boosts capacity

  # a model with the flags that its pool will have as engineArgs
  boosts capacity --model Qwen/Qwen3-8B --out qwen3-8b -- --max-num-seqs 256 --gpu-memory-utilization 0.92

  # for a pool with other limits than the defaults: only the last column changes
  boosts capacity --model /models/qwen3-8b --model-id Qwen/Qwen3-8B --tpm-limit 50000 --context-tokens 8192

Measure while nothing else uses the machine. capacity.json is what a pool takes as `declaredCapacity` and what
`boosts node --capacity FILE` reports; capacity.png is a picture of it.

exit status: 0 measured, 1 nothing could be measured, 2 the engine did not start or an option is wrong,
130 after Ctrl-C
"""
_SEAT = Seat("capacity", quantity=20)
_LONGEST_ANSWER = 8_192
_LONGEST_PROMPT = 4_096
_START_S = 1_800.0
"""A large model that is compiled at its first start takes many minutes."""
_KV_SIZE = re.compile(r"KV cache size: ([\d,]+) tokens")
_STEP_TOKENS = re.compile(r"max_num_batched_tokens=(\d+)")


class MeasureError(Exception):
    """Nothing could be measured; the message says why."""


@dataclass(frozen=True, slots=True)
class NodeEngine(Engine):
    """The engine with the operator's flags and nothing else: what is measured is what will serve."""

    def flags(self) -> list[str]:
        return ["--disable-uvicorn-access-log", *self.extra]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine says of itself."""

    slots: int
    kv_tokens: int
    context_tokens: int
    """The longest request, prompt and answer together."""
    step_tokens: int | None
    """Of one step; None if it does not say."""


@dataclass(frozen=True, slots=True)
class Level:
    """So many streams at once, each with a prompt of so many tokens."""

    streams: int
    prompt_tokens: int

    def __str__(self) -> str:
        return f"{self.streams} stream{'s' * (self.streams > 1)}, prompts of {self.prompt_tokens} tokens"


def levels(limits: Limits) -> list[Level]:
    """What to measure: 1, 2, 4, ... streams up to all slots, and some of them with a long context."""
    counts = [1 << power for power in range(limits.slots.bit_length()) if 1 << power <= limits.slots]
    if counts[-1] != limits.slots:
        counts.append(limits.slots)
    long_prompt = min(limits.context_tokens // 4, limits.kv_tokens // 4, _LONGEST_PROMPT // 2)
    most = limits.kv_tokens * 2 // 3 // long_prompt
    long_counts = {max(1, min(count, most)) for count in (1, limits.slots // 4, limits.slots)}
    return [
        *(Level(count, SHORT_PROMPT) for count in counts),
        *(Level(count, long_prompt) for count in sorted(long_counts)),
    ]


# --- measuring -----------------------------------------------------------------------------------------


class _Bar:
    """How far the measurement is: a bar on a terminal, lines elsewhere. Only ever on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("starting", total=None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self._bar:
            yield

    def say(self, text: str) -> None:
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)
        self._bar.update(self._task, description=text)

    def begin(self, steps: int) -> None:
        self._bar.update(self._task, total=steps)

    def step(self) -> None:
        self._bar.advance(self._task)


class _Meter:
    """Runs phases of load on one server."""

    def __init__(self, server: Server, limits: Limits, level_s: float, bar: _Bar) -> None:
        self._target = Target(server.launch.base_url, SERVED_NAME, _SEAT.key)
        self._log = server.log
        self._limits = limits
        self._level_s = level_s
        self._bar = bar

    def prefill_tok_s(self) -> float:
        prompt = min(_LONGEST_PROMPT, self._limits.context_tokens - 16, self._limits.kv_tokens // 4)
        self._bar.say(f"prompts of {prompt} tokens, one token of answer")
        rate = prefill_tok_s(self._phase(2, Lengths(prompt, prompt), Lengths(1, 1), warm_s=1.0))
        self._bar.step()
        return rate

    def decode(self, level: Level, prefill_tok_s: float) -> Point:
        self._bar.say(str(level))
        # Streams as long as they may be: new ones would bring prompts into the steps that are measured.
        answer = min(
            _LONGEST_ANSWER,
            self._limits.context_tokens - level.prompt_tokens,
            max(1, self._limits.kv_tokens * 9 // 10 // level.streams - level.prompt_tokens),
        )
        prompt = Lengths(level.prompt_tokens, level.prompt_tokens)
        warm_s = 1.5 + level.streams * level.prompt_tokens / prefill_tok_s
        phase = self._phase(level.streams, prompt, Lengths(max(1, answer // 2), answer), warm_s)
        self._bar.step()
        return point(str(level), phase, _SEAT.name)

    def _phase(self, streams: int, prompt: Lengths, answer: Lengths, warm_s: float) -> Phase:
        seed = f"capacity/{streams}/{prompt.low}"
        client = ClosedLoop(_SEAT.name, self._target, streams, prompt, answer, seed)
        phase = asyncio.run(run_phase([client], warm_s=warm_s, window_s=self._level_s))
        failed = [record.error for record in phase.records if record.error is not None]
        if failed:
            raise MeasureError(f"{len(failed)} requests failed (log: {self._log}), the first: {failed[0]}")
        return phase


def measure(options: argparse.Namespace, folder: Path, bar: _Bar) -> Measured:
    """Start the engine, load it, fit. Raises ServerStartError and MeasureError."""
    engine = NodeEngine(options.model, extra=tuple(options.engine_flags))
    # Serving keeps files of its own beside its entitlements.
    home = folder / "engine"
    home.mkdir(exist_ok=True)
    entitlements = home / "entitlements.json"
    write_entitlements([_SEAT], entitlements, guarantee_tok_s=0.0)
    active_share = _active_share(options.model)
    with running([seat_node(engine, entitlements)], home, bar.say, timeout_s=_START_S) as [server]:
        limits = _limits(server, options.max_num_seqs)
        plan = levels(limits)
        bar.begin(1 + len(plan))
        meter = _Meter(server, limits, options.level_s, bar)
        try:
            rate = meter.prefill_tok_s()
            points = [meter.decode(level, rate) for level in plan]
        except ValueError as failure:
            raise MeasureError(str(failure)) from None
    entitlements.unlink()
    step, error = fit(points, rate, active_share)
    capacity = NodeCapacity(
        model_id=options.model_id or str(options.model),
        **asdict(step),
        slots=limits.slots,
        kv_tokens=limits.kv_tokens,
        step_tokens=limits.step_tokens,
        error=error,
        measured_at=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
    )
    promise = Promise(0.0, options.tpm_limit, options.prefill_tok_s, options.context_tokens, options.margin)
    return Measured(capacity, promise, tuple(points), tuple(offers(capacity, promise)), rate)


def _limits(server: Server, max_num_seqs: int | None) -> Limits:
    # By its own word, as vLLM has its defaults for each device; it says nothing before some steps.
    told = server.report().capacity
    slots = max_num_seqs if told is None else told.slots
    if slots is None:
        raise MeasureError(
            "the machine is so slow that the engine does not say how many streams it runs at once: add "
            "`-- --max-num-seqs N`"
        )
    log = server.log.read_text(errors="replace")
    sizes, step_tokens = _KV_SIZE.findall(log), _STEP_TOKENS.findall(log)
    if not sizes:
        raise MeasureError(f"{server.log} does not say how large the KV cache is")
    request = urllib.request.Request(  # noqa: S310 - our own http URL
        f"{server.launch.base_url}/v1/models", headers={"Authorization": f"Bearer {_SEAT.key}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - our own http URL
        [model] = json.load(answer)["data"]
    # Several engines each say theirs; a stream lives in one.
    return Limits(
        slots,
        int(sizes[-1].replace(",", "")),
        int(model["max_model_len"]),
        int(step_tokens[-1]) if step_tokens else None,
    )


def _active_share(model: str) -> float:
    """Of a mixture of experts, the share of them that one token uses; 0 for a dense model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        # A model that only vLLM knows: it is fitted as a dense one.
        return 0.0
    config = getattr(config, "text_config", config)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    active = getattr(config, "num_experts_per_tok", None)
    return float(active / experts) if experts and active else 0.0


# --- the command line ----------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Measure and tell: progress on stderr, tables on stdout. Returns the exit status."""
    options = parse(argv)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = options.out or Path(os.environ.get("BOOSTS_HOME", "var")) / "capacity" / stamp
    folder.mkdir(parents=True, exist_ok=True)
    # The model may have to be downloaded; a benchmark's servers are kept from that by default.
    os.environ.setdefault("HF_HUB_OFFLINE", "0")
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    bar = _Bar()
    try:
        with bar.shown():
            measured = measure(options, folder, bar)
    except ServerStartError as failure:
        print(f"boosts capacity: {failure}", file=sys.stderr)
        return 2
    except MeasureError as failure:
        print(f"boosts capacity: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("boosts capacity: interrupted; the engine is stopped", file=sys.stderr)
        return 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    written = write(measured, folder)
    print(f"{report(measured)}\n")
    for path in written:
        print(f"written: {path}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What the command line says. Ends the process when that is wrong."""
    arguments, flags = list(argv), []
    if "--" in arguments:
        split = arguments.index("--")
        arguments, flags = arguments[:split], arguments[split + 1 :]
    parser = _parser()
    options = parser.parse_args(arguments)
    # The pool's own engineArgs can be given as they are.
    engine = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    engine.add_argument("--max-num-seqs", type=int)
    known, _ = engine.parse_known_args(flags)
    options.engine_flags, options.max_num_seqs = flags, known.max_num_seqs
    if options.max_num_seqs is not None and options.max_num_seqs < 1:
        parser.error("--max-num-seqs must be 1 or more")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="boosts capacity",
        usage="boosts capacity [options] [-- VLLM FLAGS]",
        description="Measure what this machine can do with a model: the best total at each pace, the prefill "
        "rate, and how many seats can be sold.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # `boosts capacity` gives the demo model's folder where none is named; benchmarks build no models.
    add("--model", required=True, help="model folder or Hugging Face id (default: the demo model)")
    add("--model-id", metavar="ID", help="the pool's modelId, where --model is a folder (default: --model)")
    add("--out", type=Path, metavar="DIR", help="where the results go (default: var/capacity/<UTC time>)")
    add("--level-s", type=_positive, default=8.0, help="seconds for each level (default: %(default)g)")
    terms = parser.add_argument_group("terms of the pool, for the seats to sell")
    terms.add_argument("--tpm-limit", type=int, default=100_000, help="of one seat (default: %(default)s)")
    terms.add_argument(
        "--prefill-tok-s", type=_positive, default=1_000.0, help="of one seat (default: %(default)g)"
    )
    terms.add_argument(
        "--context-tokens",
        type=int,
        default=DEFAULT_CONTEXT_TOKENS,
        help="counted for each seat (default: %(default)s)",
    )
    terms.add_argument(
        "--margin", type=_share, default=DEFAULT_MARGIN, help="left unsold (default: %(default)s)"
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("must be 0 or more, and below 1")
    return value


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    # Once: a second signal would cut the stopping of the engine short and leave it behind.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
