"""Intel's tile instructions (AMX), for vLLM on a CPU that has them.

Linux lets a process use the tiles only after it has asked (arch_prctl(2), ARCH_REQ_XCOMP_PERM). vLLM 0.32
uses them for attention wherever the processor has them and leaves the asking to oneDNN, which a small model
may never call: its worker then dies of an illegal instruction.
"""

from __future__ import annotations

import ctypes
import platform
import sys

_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XTILEDATA = 18


def allow_tiles() -> None:
    """Ask for the tiles, for this process and all that it forks; one that it spawns has to ask for itself.
    Where there are none it is refused, which changes nothing."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA)
