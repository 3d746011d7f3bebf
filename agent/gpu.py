"""What NVML says of the machine's GPUs.

A call into the driver may take long, and into a wedged one for ever. So a thread of its own asks,
and the agent takes what was seen last; a process can end without waiting for a daemon thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pynvml  # type: ignore[import-untyped]

from contract.nodes import GpuFigures

STALE_S = 60.0
"""Figures older than this are shown to nobody."""
MAX_GPUS = 64

log = logging.getLogger("boosts.agent")


class GpuWatch:
    """The newest figures of all GPUs, in NVML's order."""

    def __init__(self, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._complained = ""
        self._seen: tuple[float, tuple[GpuFigures, ...]] = (clock(), ())

    def start(self) -> None:
        """Ask from now on, until the process ends."""
        threading.Thread(target=self._run, name="gpu", daemon=True).start()

    @property
    def figures(self) -> tuple[GpuFigures, ...]:
        """Empty without a GPU, without a driver, or when the driver has stopped answering."""
        seen_at, figures = self._seen
        return figures if self._clock() - seen_at < STALE_S else ()

    def _run(self) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            log.debug("no GPU figures: %s", error)
            return
        while True:
            self.look()
            time.sleep(self._every_s)

    def look(self) -> None:
        """Ask once."""
        try:
            figures = tuple(
                _figures(pynvml.nvmlDeviceGetHandleByIndex(index))
                for index in range(min(MAX_GPUS, pynvml.nvmlDeviceGetCount()))
            )
        except pynvml.NVMLError as error:
            if str(error) != self._complained:
                log.warning("no GPU figures: %s", error)
                self._complained = str(error)
        else:
            self._seen = (self._clock(), figures)


def _figures(handle: object) -> GpuFigures:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    utilization = _supported(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    milliwatts = _supported(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    celsius = _supported(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    return GpuFigures(
        name=str(pynvml.nvmlDeviceGetName(handle))[:100],
        memory_used_bytes=int(memory.used),
        memory_total_bytes=int(memory.total),
        utilization_percent=None if utilization is None else min(100, utilization),
        power_watts=None if milliwatts is None else milliwatts / 1000,
        temperature_celsius=None if celsius is None else max(0, celsius),
    )


def _supported(ask: Callable[[], int]) -> int | None:
    # A slice of a GPU (MIG) and some cards do not measure everything.
    try:
        return int(ask())
    except pynvml.NVMLError_NotSupported:
        return None
