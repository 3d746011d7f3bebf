"""Compiles the step policy, with BOOSTS_COMPILE=1; the rest of the build is in pyproject.toml.

The policy runs between two steps of the engine, where its time is everybody's. mypyc makes C of the same
typed source, and both decide alike (tests/integration/test_compiled.py). A checkout is not compiled: there an
edit counts at once.
"""

import os

from setuptools import setup

COMPILED = (
    "contract/step_time.py",
    "scheduler/arrange.py",
    "scheduler/borrowed_limit.py",
    "scheduler/paces.py",
    "scheduler/prompts.py",
    "scheduler/room.py",
    "scheduler/step_rules.py",
    "scheduler/step_time.py",
    "scheduler/steps.py",
    "scheduler/streams.py",
    "scheduler/turns.py",
)

if os.environ.get("BOOSTS_COMPILE") == "1":
    from mypyc.build import mypycify

    setup(ext_modules=mypycify(["--config-file=", *COMPILED], opt_level="3"))
else:
    setup()
