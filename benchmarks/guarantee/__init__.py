"""Scenario: every promise of the scheduler against a real vLLM, beside plain vLLM on the same machine.

A row per promise, each in a module of its own that says what is measured and how; `run` measures those
that were asked for. Both servers stay loaded and are measured in turns; the seats of the node and their
guarantee change from row to row.
"""

from benchmarks.guarantee.bench import NothingServedError
from benchmarks.guarantee.config import DEMO_WIDTH, Config
from benchmarks.guarantee.run import ROWS, expected_s, plot, run, summarize

__all__ = ["DEMO_WIDTH", "ROWS", "Config", "NothingServedError", "expected_s", "plot", "run", "summarize"]
