"""The step scheduler in a CUDA vLLM, Qwen3-8B with dummy weights, beside plain vLLM on the same GPU.

One short benchmark run for all: a few minutes, of which most is loading. What is asserted holds with room to
spare; the figures are for `boosts bench gpu`, whose rounds are long enough for them.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu, guarantee
from benchmarks.estimates import median
from benchmarks.guarantee.step_time import TARGET_US
from benchmarks.report import Result, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("cuda"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, cuda: None) -> Result:
    folder = tmp_path_factory.mktemp("gpu")
    config = replace(gpu.gpu_config(folder).quick(), pace_rounds=3)
    result = gpu.run(config, print)
    # JSON for whoever ran it: pytest's own folders are soon forgotten.
    write(result, Path(os.environ.get("GPU_RESULTS", folder)), guarantee.plot)
    return result


def test_every_row_is_measured_without_a_failed_request(result: Result) -> None:
    assert set(result.figures) == set(gpu.ROWS)
    assert sum(row["errors"] for row in result.rows) == 0


def test_the_owed_stream_keeps_twice_plain_vllms_pace(result: Result) -> None:
    ours = [row for row in result.rows if row["row"] == "pace" and row["run"] == "ours"]
    assert median([row["owed_tok_s"] / row["guarantee_tok_s"] for row in ours]) >= 0.95


def test_where_no_pace_is_in_danger_the_total_is_close_to_plain_vllms(result: Result) -> None:
    for row in ("total", "lone"):
        for case, figures in result.figures[row].items():
            assert figures["total_over_plain"]["value"] >= 0.9, case


def test_a_step_costs_little_more(result: Result) -> None:
    for case, figures in result.figures["step-time"].items():
        assert figures["mean_us"] <= 3 * TARGET_US, case


def test_the_node_ran_on_the_gpu_with_its_own_scheduler(result: Result) -> None:
    steps = [row["steps"] for row in result.rows if row["row"] == "step-time"]
    assert len(steps) == 2
    assert min(steps) > 0
