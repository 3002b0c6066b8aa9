"""Two processes test side by side (-n 2 in pyproject.toml), each with one thread: more would wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
