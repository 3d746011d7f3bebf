"""`python -m serving` is `python -m serving.main`."""

import os
import sys

# In place of this process: children that multiprocessing spawns import their parent's main module by
# name, and it refuses names that end in `__main__`.
os.execv(sys.executable, [sys.executable, "-m", "serving.main", *sys.argv[1:]])  # noqa: S606 - no shell wanted
