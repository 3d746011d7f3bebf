"""Benchmarks: scenarios against running servers, a load generator, reports."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Run one scenario from command-line arguments; returns the exit status."""
    # Imported here, so that asking `benchmarks` for its name costs no matplotlib.
    from benchmarks.cli import main as run_scenario

    return run_scenario(argv)
