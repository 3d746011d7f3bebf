"""Serving and its engine processes die together.

vLLM's EngineCore outlives a killed API server and keeps the GPU (vllm-project/vllm #55510). Linux can
send a signal to a child when its parent dies (prctl(2), PR_SET_PDEATHSIG); it is asked for in every
process that vLLM forks or spawns from ours.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(last_signal: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process `last_signal` when the one that started it is gone."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, last_signal)
    if os.getppid() != parent:
        # It went between the two calls; nobody will tell us any more.
        os.kill(os.getpid(), last_signal)


def stop_with_parent() -> None:
    """The same with SIGTERM, for a process that stops its own children in order."""
    die_with_parent(signal.SIGTERM)


def keep_children_close() -> None:
    """Let every child forked from here on die with its parent."""
    os.register_at_fork(after_in_child=die_with_parent)
