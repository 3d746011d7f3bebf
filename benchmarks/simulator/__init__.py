"""A discrete-event simulation of one node, around the admission scheduler that production runs.

`Simulation(scenario, seed).run()` plays clients against an engine with slots, a KV cache and a model of
step time, and returns the trace; `oracles.violations` watches a trace from outside and tells which
promises it breaks. Pure: no clock, no I/O; a seed replays a run event for event.
"""

from benchmarks.simulator.clients import Client, ClosedLoop, OnOff, OpenLoop, Shape
from benchmarks.simulator.engine import QWEN3_8B_H100, StepTime
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
    "StepTime",
]
