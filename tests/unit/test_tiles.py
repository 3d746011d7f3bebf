"""A process that asked may use the processor's tiles, and so may what it forks."""

import ctypes
import multiprocessing
import platform
import sys
from multiprocessing.connection import Connection

import pytest

from serving.tiles import allow_tiles

_SYS_ARCH_PRCTL, _ARCH_GET_XCOMP_SUPP, _ARCH_GET_XCOMP_PERM = 158, 0x1021, 0x1022
_XTILEDATA = 1 << 18


def _has_tiles(what: int) -> bool:
    """Whether the tiles are among what the kernel supports, or permits this process."""
    features = ctypes.c_uint64()
    failed = ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, what, ctypes.byref(features))
    return not failed and bool(features.value & _XTILEDATA)


def _tell(to: Connection) -> None:
    to.send(_has_tiles(_ARCH_GET_XCOMP_PERM))


def _ask_and_fork(to: Connection) -> None:
    allow_tiles()
    _tell(to)
    child = multiprocessing.get_context("fork").Process(target=_tell, args=(to,))
    child.start()
    child.join()


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="tiles are asked for on x86-64 Linux"
)
def test_tiles_are_allowed_wherever_the_kernel_has_them() -> None:
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_ask_and_fork, args=(sender,))
    process.start()
    told = [receiver.recv(), receiver.recv()]
    process.join()
    assert told == [_has_tiles(_ARCH_GET_XCOMP_SUPP)] * 2
