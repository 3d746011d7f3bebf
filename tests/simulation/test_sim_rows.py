"""What the simulated rows say of their targets."""

from benchmarks.simulator.rows import Run, _arena_checks
from benchmarks.simulator.service import Shares


def arena(engine: str, policy: str, max_diff: float, tok_s: float) -> Run:
    return Run("arena", "trace", 0, engine, policy, Shares(max_diff, 0.0, 0.0, tok_s, 0), 0, None)


def test_the_real_trace_is_judged_by_each_engine() -> None:
    runs = [
        arena("artifact", "FCFS", 700.0, 800.0),
        arena("artifact", "ours", 400.0, 720.0),
        arena("vllm", "FCFS", 700.0, 750.0),
        arena("vllm", "ours", 300.0, 750.0),
    ]
    checks = {check.target: check for check in _arena_checks(runs)}
    assert len(checks) == 4
    assert {target.split(":")[0] for target, check in checks.items() if not check.met} == {
        "arena, artifact engine"
    }
    assert sum(check.met for check in checks.values()) == 2
