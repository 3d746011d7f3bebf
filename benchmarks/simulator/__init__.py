"""A discrete-event simulation of one node, around the scheduler that production runs.

`Simulation(scenario, seed).run()` plays clients against admission, the step policy and an engine with vLLM's
batching rules, and returns the trace; `oracles.violations` watches a trace from outside and tells which
promises it breaks. `experiment.play` runs one workload under one of the policies of `entry`, ours among them.
Pure: no clock, no I/O; a seed replays a run event for event. docs/simulation.md tells what came out.
"""

from benchmarks.simulator.clients import Client, ClosedLoop, OnOff, OpenLoop, Shape
from benchmarks.simulator.machines import QWEN3_8B_H100
from benchmarks.simulator.simulation import Change, Scenario, SeatPlan, Simulation

__all__ = [
    "QWEN3_8B_H100",
    "Change",
    "Client",
    "ClosedLoop",
    "OnOff",
    "OpenLoop",
    "Scenario",
    "SeatPlan",
    "Shape",
    "Simulation",
]
