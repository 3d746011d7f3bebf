"""What one run of the guarantee scenario measures, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.load import Lengths

DEMO_WIDTH = 6
"""Of the demo model for this scenario. Its steps take 15 ms beside 64 streams and 3 ms alone, so that on two
cores the engine is the bottleneck, as on a GPU, and not the HTTP server and the load generator on the other
core; and so that a stream can have twice the rate that it gets beside 64."""

_IN_PROCESS = "--distributed-executor-backend=vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The worker inside EngineCore, as vLLM itself runs a single GPU. In a process of its own, vLLM's default on
CPUs, both wait for each other in busy loops on cores that others need: on two cores throughput then varied
by 40 % from second to second."""

_SHORT, _MEDIUM, _LONG = Lengths(16, 128), Lengths(128, 384), Lengths(2000, 2000)
_BRIEF, _QUIET = Lengths(16, 64), Lengths(8, 24)


@dataclass(frozen=True, slots=True)
class Config:
    """One run. Times are in seconds; a *round* is one turn of every system that is compared."""

    model: str
    folder: Path
    """Where logs and results go."""
    only: tuple[str, ...] = ()
    """Names of the rows to measure; none means all."""
    max_num_seqs: int = 72
    eager: bool = True
    engine_flags: tuple[str, ...] = (_IN_PROCESS,)
    start_together: bool = True
    """Whether both servers may load at once: not where they share a GPU's memory."""
    start_timeout_s: float = 300.0
    warm_s: float = 2.0
    warm_tokens: int = 400
    """Both servers first compute steps of every size up to this one: on a CPU, oneDNN generates code for each
    new one, which costs 3 to 8 ms. More than 72 decodes and two prompts. A GPU needs none."""
    seed: int = 1

    noisy_streams: int = 64
    noisy_input: Lengths = _SHORT
    noisy_output: Lengths = _MEDIUM
    owed_input: Lengths = _SHORT
    owed_output: Lengths = _LONG
    """Of the stream that holds the guarantee: long, so that it spans many whole seconds."""

    pace_times: float = 2.0
    """The guarantee, as a multiple of what plain vLLM gives the stream beside the crowd."""
    calibration_s: float = 5.0
    pace_rounds: int = 18
    """Some 400 busy seconds: of fewer than 381 an interval does not reach 99 %, even if none was missed."""
    pace_s: float = 26.0
    fixed_s: float = 5.0

    starts: int = 10
    """Of both servers, for total and lone: one start says nothing of how starts differ."""
    pairs: int = 3
    """On every start."""
    pair_s: float = 4.0
    pair_warm_s: float = 1.5
    easy_times: float = 0.5
    """The guarantee where no pace is in danger, as a multiple of what plain vLLM gives anyway."""
    easy_guarantee_tok_s: float = 20.0
    """The guarantee where nothing depends on it."""
    lone_streams: int = 48
    lone_many_streams: int = 144
    """More than there are slots, and no more than may wait for them."""

    quiet_seats: int = 5
    """Each sends one request a second."""
    quiet_input: Lengths = _BRIEF
    quiet_output: Lengths = _QUIET
    isolation_rounds: int = 10
    beside_s: float = 25.0
    solo_s: float = 20.0
    flood_times: float = 3.0
    """The flooder's requests per second, as a multiple of what the machine can serve."""

    shares_warm_s: float = 15.0
    """Who connects first fills all slots, and pays that back: until the slots have turned over."""
    shares_s: float = 240.0
    shares_connections: int = 96
    flood_rounds: int = 5
    flood_s: float = 12.0
    flood_connections: int = 200
    fair_output: Lengths = _SHORT
    """Short answers, so that those which straddle the ends of a window weigh little."""

    visits: int = 50
    visit_groups: int = 5
    idle_s: float = 2.0
    busy_s: float = 4.0
    visit_connections: int = 128
    visit_output: Lengths = _BRIEF

    overload_rounds: int = 5
    suites_warm_s: float = 10.0
    suites_s: float = 50.0

    step_streams: int = 256
    step_guarantee_tok_s: float = 5.0
    """The guarantee with which no pace is in danger beside that many: each gets about 17 tok/s."""
    step_s: float = 20.0

    def quick(self) -> Config:
        """The same in a few minutes: shows that it works, proves nothing."""
        return replace(
            self,
            warm_s=1.0,
            warm_tokens=min(self.warm_tokens, 100),
            calibration_s=2.0,
            pace_rounds=2,
            pace_s=8.0,
            fixed_s=3.0,
            starts=1,
            pairs=min(self.pairs, 3),
            pair_s=2.0,
            pair_warm_s=1.0,
            isolation_rounds=1,
            beside_s=8.0,
            solo_s=6.0,
            shares_warm_s=5.0,
            shares_s=20.0,
            flood_rounds=1,
            flood_s=6.0,
            visits=4,
            visit_groups=1,
            overload_rounds=1,
            suites_warm_s=3.0,
            suites_s=8.0,
            step_s=5.0,
        )
