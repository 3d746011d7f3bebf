"""The compiled step policy, built as a node's image builds it: it decides like its source."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRACES = """
import hashlib
from benchmarks.simulator.adversaries import random_scenario
from benchmarks.simulator.simulation import Simulation
from scheduler import steps
print(steps.__file__)
for seed in range(40):
    events = Simulation(random_scenario(seed), seed).run()
    print(seed, len(events), hashlib.sha256(repr(events).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product with its step policy compiled, as a folder of packages."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("compiled")
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for name in project["tool"]["setuptools"]["packages"]["find"]["include"]:
        package = name.removesuffix("*")
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    pip = (sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", "install")
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--target", str(target), str(source)],
        env={**os.environ, "BOOSTS_COMPILE": "1"},
        check=True,
    )
    return target


def traces(packages: Path) -> tuple[str, list[str]]:
    """The step policy's file, and what the simulations with these packages did."""
    ran = subprocess.run(
        [sys.executable, "-c", TRACES],
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(packages)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    file, *lines = ran.stdout.splitlines()
    return file, lines


def test_the_compiled_policy_does_what_its_source_does(compiled: Path) -> None:
    source_file, of_source = traces(ROOT)
    compiled_file, of_compiled = traces(compiled)

    assert source_file == str(ROOT / "scheduler" / "steps.py")
    assert Path(compiled_file).parent == compiled / "scheduler"
    assert compiled_file.endswith(".so")
    assert of_compiled == of_source
