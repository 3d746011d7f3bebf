"""The simulated rows: the VTC paper's experiments again, the production scheduler beside its policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.report import Check, Result, Table
from benchmarks.simulator import decision, paper
from benchmarks.simulator.continuous import ContinuousEngine
from benchmarks.simulator.engine import Rules
from benchmarks.simulator.entry import EntryPolicy, Fcfs, Ours, Vtc, VtcOracle, VtcPredicted
from benchmarks.simulator.experiment import Played, play
from benchmarks.simulator.machines import LLAMA2_7B_A10G
from benchmarks.simulator.reservation import ReservationEngine
from benchmarks.simulator.service import Shares, first_token_waits, gaps, percentile, shares
from benchmarks.simulator.workloads import LENGTHS, SUITES, Workload, suite, with_lengths
from scheduler import Capacity

Say = Callable[[str], None]
ENGINES = ("artifact", "vllm")
"""Whose rules the real trace is played by."""
SLOTS = 256
GAP_TARGET = 2_000.0
"""0.05 of 2U = 40,000, in cost units."""
DIFF_TARGET = 368.0
"""VTC's largest difference on the real trace."""
THROUGHPUT_TARGET = 0.98
"""Ours over FCFS's on the same engine."""
DECISION_TARGET_S = 100e-6
SEEDS = range(1, 9)
"""Of the random lengths of `overload`."""
MODEST = {"on_off_less": "client0", "proportional": "client0", "increase": "client0"}
"""The client that asks for less than its share, by suite."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is run."""

    quick: bool = False
    """Leaves out all suites but `overload`, and all seeds but two."""
    decisions: int = 20_000


@dataclass(frozen=True, slots=True)
class Run:
    """One workload under one policy."""

    workload: str
    lengths: str
    seed: int
    engine: str
    policy: str
    shares: Shares
    preemptions: int
    modest_ttft_p99_s: float | None

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "shares": None, **asdict(self.shares)}


def simulate(
    trace: Workload, options: Options, say: Say
) -> tuple[Result, dict[str, list[tuple[float, float]]]]:
    """All rows, and for the picture the gaps of `overload` over time, by policy."""
    say("the published policies on the real trace, by the artifact's engine")
    fitted = paper.arena_rows(trace, LLAMA2_7B_A10G)
    runs = list(_arena(trace, say))
    picture: dict[str, list[tuple[float, float]]] = {}
    for workload, law, seed in _plan(options):
        say(f"{workload.name}, {law} lengths, seed {seed}")
        policies: list[EntryPolicy] = [Fcfs(), Vtc(workload.weights), ours(workload)]
        if workload.name == "overload":
            policies += [VtcPredicted(workload.weights), VtcOracle(workload.weights)]
        for policy in policies:
            run, played = _run(workload, law, seed, "vllm", policy)
            runs.append(run)
            if workload.name == "overload" and law == "uniform" and seed == 1:
                picture[policy.name] = gaps(played)
    say("decisions")
    took = {
        case: decision.decision_times(options.decisions, guarantee_tok_s)
        for case, guarantee_tok_s in decision.GUARANTEES.items()
    }
    return _result(fitted, runs, took, options), picture


def ours(workload: Workload) -> Ours:
    return Ours(workload.weights, Capacity(SLOTS, workload.kv_tokens))


def _plan(options: Options) -> Iterable[tuple[Workload, str, int]]:
    for name in SUITES:
        if options.quick and name != "overload":
            continue
        base = suite(name)
        for law in LENGTHS:
            seeds = list(SEEDS)[: 2 if options.quick else None] if name == "overload" else [1]
            for seed in seeds if law != "constant" else [1]:
                yield (base if law == "constant" else with_lengths(base, law, seed)), law, seed


def _arena(trace: Workload, say: Say) -> Iterable[Run]:
    for engine in ENGINES:
        say(f"the real trace on the {engine} engine, ours beside FCFS and VTC")
        for policy in (Fcfs(), Vtc(trace.weights), ours(trace)):
            yield _run(trace, "trace", 0, engine, policy)[0]


def _run(workload: Workload, law: str, seed: int, engine: str, policy: EntryPolicy) -> tuple[Run, Played]:
    if engine == "artifact":
        played = play(workload, policy, ReservationEngine(LLAMA2_7B_A10G, workload.kv_tokens))
        preemptions = 0
    else:
        vllm = ContinuousEngine(LLAMA2_7B_A10G, Rules(SLOTS, workload.kv_tokens))
        played = play(workload, policy, vllm)
        preemptions = vllm.preemptions
    modest = MODEST.get(workload.name)
    waits = first_token_waits(played, modest) if modest else []
    ttft = percentile(waits, 0.99) if waits else None
    return Run(workload.name, law, seed, engine, policy.name, shares(played), preemptions, ttft), played


# --- what it says ------------------------------------------------------------------------------------------


def _result(
    fitted: dict[str, list[Shares]], runs: list[Run], took: dict[str, list[float]], options: Options
) -> Result:
    return Result(
        scenario="simulate",
        config={**asdict(options), "step_time": asdict(LLAMA2_7B_A10G), "slots": SLOTS},
        figures={
            "fit": {name: paper.ARENA[name].errors(paper.mean(found)) for name, found in fitted.items()},
            "decision_us": {
                case: {f"p{share}": percentile(times, share / 100) * 1e6 for share in (50, 99)}
                for case, times in took.items()
            },
        },
        tables=(_fit_table(fitted), _arena_table(runs), _overload_table(runs), _suites_table(runs)),
        checks=(
            *_fit_checks(fitted),
            *_arena_checks(runs),
            *_overload_checks(runs),
            *(_decision_check(case, percentile(times, 0.99)) for case, times in took.items()),
        ),
        rows=[run.row() for run in runs],
        notes=(
            "the 13B suites run with the 7B model's step times: their shape counts, not their seconds",
            "the engine tells other policies whether a prompt fits; ours reckons with expected lengths",
        ),
    )


def _fit_table(fitted: dict[str, list[Shares]]) -> Table:
    rows = []
    for name, noisy in fitted.items():
        found = paper.mean(noisy)
        errors = paper.ARENA[name].errors(found)
        cells = (found.max_diff, found.avg_diff, found.tok_s, found.served)
        shown = (f"{cell:.0f} ({error:+.1%})" for cell, error in zip(cells, errors.values(), strict=True))
        spread = [run.max_diff for run in noisy]
        label = name if name in paper.FITTED else f"{name} *"
        rows.append((label, *shown, f"{min(spread):.0f}-{max(spread):.0f}"))
    count = len(paper.NOISE_SEEDS)
    title = f"Real trace, the artifact's engine: mean of {count} (against published; * not fitted)"
    columns = ("policy", "max diff", "avg diff", "tok/s", "served", "max diff from-to")
    return Table(title, columns, tuple(rows))


def _arena_table(runs: list[Run]) -> Table:
    rows = tuple(
        (
            f"{r.engine}: {r.policy}",
            *(f"{x:.0f}" for x in (r.shares.max_diff, r.shares.avg_diff, r.shares.tok_s)),
        )
        for r in runs
        if r.workload == "arena"
    )
    return Table("Real trace: ours", ("engine: policy", "max diff", "avg diff", "tok/s"), rows)


def _overload_table(runs: list[Run]) -> Table:
    rows = []
    for law in LENGTHS:
        for policy in ("FCFS", "VTC", "VTC predicted", "VTC oracle", "ours"):
            found = _overload(runs, law, policy)
            gap = sorted(run.shares.max_gap for run in found)
            tok_s = median(run.shares.tok_s for run in found)
            rows.append(
                (f"{law}: {policy}", f"{median(gap):.0f}", f"{gap[-1]:.0f}", str(len(gap)), f"{tok_s:.0f}")
            )
    columns = ("lengths: policy", "gap, median", "gap, worst", "seeds", "tok/s")
    return Table("overload: largest accumulated gap, cost units (2U = 40,000)", columns, tuple(rows))


def _suites_table(runs: list[Run]) -> Table:
    cases: dict[tuple[str, str], dict[str, Run]] = {}
    for run in runs:
        if run.workload != "arena" and run.seed == 1:
            cases.setdefault((run.workload, run.lengths), {})[run.policy] = run
    rows = []
    for (name, law), by_policy in cases.items():
        cells = [f"{name}, {law}"]
        for policy in ("FCFS", "VTC", "ours"):
            run = by_policy[policy]
            cells += [f"{run.shares.max_gap:.0f}", f"{run.shares.max_diff:.0f}", f"{run.shares.tok_s:.0f}"]
            ttft = run.modest_ttft_p99_s
            cells.append("" if ttft is None else f"{ttft:.1f}")
        rows.append(tuple(cells))
    columns = (
        "suite, lengths",
        *(f"{p} {x}" for p in ("FCFS", "VTC", "ours") for x in ("gap", "diff", "tok/s", "p99")),
    )
    return Table(
        "Suites on the vLLM engine (gap by weight; diff per second; modest client's TTFT p99, s)",
        columns,
        tuple(rows),
    )


def _fit_checks(fitted: dict[str, list[Shares]]) -> list[Check]:
    checks = []
    for name in paper.FITTED:
        errors = paper.ARENA[name].errors(paper.mean(fitted[name]))
        worst = max(errors, key=lambda column: abs(errors[column]))
        met = abs(errors[worst]) <= paper.TOLERANCE
        checks.append(Check(f"{name} within 10 % of the published row", f"{worst} {errors[worst]:+.1%}", met))
    return checks


def _arena_checks(runs: list[Run]) -> list[Check]:
    """By both engines: the published 368 was measured on the artifact's."""
    checks = []
    for engine in ENGINES:
        arena = {run.policy: run.shares for run in runs if run.workload == "arena" and run.engine == engine}
        mine, ratio = arena["ours"].max_diff, arena["ours"].tok_s / arena["FCFS"].tok_s
        where = f"arena, {engine} engine"
        checks += [
            Check(f"{where}: max difference below {DIFF_TARGET:.0f}", f"{mine:.0f}", mine < DIFF_TARGET),
            Check(
                f"{where}: throughput at least {THROUGHPUT_TARGET} of FCFS's",
                f"{ratio:.3f}",
                ratio >= THROUGHPUT_TARGET,
            ),
        ]
    return checks


def _overload_checks(runs: list[Run]) -> list[Check]:
    checks = []
    for law in LENGTHS:
        gap = [run.shares.max_gap for run in _overload(runs, law, "ours")]
        target = f"overload, {law} lengths: gap at most {GAP_TARGET:.0f} in every run"
        shown = f"worst {max(gap):.0f}, median {median(gap):.0f} of {len(gap)}"
        checks.append(Check(target, shown, max(gap) <= GAP_TARGET))
    return checks


def _decision_check(case: str, p99_s: float) -> Check:
    target = f"decision with {decision.SEATS} seats and 10,000 queued, all {case}: p99 at most 100 us"
    return Check(target, f"{p99_s * 1e6:.0f} us", p99_s <= DECISION_TARGET_S)


def _overload(runs: list[Run], law: str, policy: str) -> list[Run]:
    return [r for r in runs if (r.workload, r.lengths, r.policy) == ("overload", law, policy)]
