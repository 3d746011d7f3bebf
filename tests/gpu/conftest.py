"""Tests here need a CUDA GPU with its own vLLM; elsewhere each is skipped and says how to run it."""

from __future__ import annotations

import pytest

from benchmarks.gpu import missing_gpu


@pytest.fixture(scope="session")
def cuda() -> None:
    """Skips the test where there is no GPU."""
    reason = missing_gpu()
    if reason is not None:
        pytest.skip(
            f"{reason}; these tests: pip install pytest-asyncio pytest-timeout hypothesis, "
            "python -m pytest tests/gpu"
        )
