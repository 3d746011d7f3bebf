"""GPU figures, from a driver in the test's hands."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pynvml  # type: ignore[import-untyped]
import pytest

from agent.gpu import STALE_S, GpuWatch
from contract.nodes import GpuFigures


class Driver:
    """Stands in for NVML, for two GPUs of which the second measures no power."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: Exception | None = None
        for name, answer in {
            "Count": self.count,
            "HandleByIndex": lambda index: index,
            "MemoryInfo": lambda handle: SimpleNamespace(used=10 + handle, total=80),
            "UtilizationRates": lambda handle: SimpleNamespace(gpu=50),
            "PowerUsage": self.power,
            "Temperature": lambda handle, sensor: 40,
            "Name": lambda handle: f"GPU {handle}",
        }.items():
            monkeypatch.setattr(pynvml, f"nvmlDeviceGet{name}", answer)

    def count(self) -> int:
        if self.fault is not None:
            raise self.fault
        return 2

    def power(self, handle: int) -> int:
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 350_500


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_figures_are_in_base_units_and_unmeasured_ones_are_null(driver: Driver) -> None:
    watch = GpuWatch(10.0)
    watch.look()
    assert watch.figures == (
        GpuFigures(
            name="GPU 0",
            memory_used_bytes=10,
            memory_total_bytes=80,
            utilization_percent=50,
            power_watts=350.5,
            temperature_celsius=40,
        ),
        GpuFigures(
            name="GPU 1",
            memory_used_bytes=11,
            memory_total_bytes=80,
            utilization_percent=50,
            power_watts=None,
            temperature_celsius=40,
        ),
    )


def test_figures_of_a_driver_that_stopped_answering_are_shown_to_nobody(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    watch = GpuWatch(10.0, clock=lambda: now)
    watch.look()
    driver.fault = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    watch.look()
    watch.look()
    assert len(watch.figures) == 2
    assert len(caplog.records) == 1
    now = STALE_S
    assert not watch.figures


def test_machine_without_a_driver_has_no_figures_and_one_line_about_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    caplog.set_level(logging.DEBUG)
    watch = GpuWatch(10.0)
    watch._run()
    assert not watch.figures
    assert len(caplog.records) == 1
