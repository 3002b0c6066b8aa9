"""A run whose rewards are served elsewhere is the run with the rewards in process."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest

import flow_grpo

SMALL = dict(num_iterations=3, num_prompts=2, group_size=4, micro_batch_size=4, num_steps=3, eval_num_steps=2)
SMALL |= dict(window_range=(0, 2), window_size=2, eval_size=6, eval_every=2, save_every=3)


def train(runs):
    for out, reward in runs:
        flow_grpo.main(dataclasses.replace(flow_grpo.Args(), out=out, reward=reward, **SMALL))


def metrics(run):
    """The rows of metrics.jsonl without what measures time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds_rollout", "seconds_reward", "seconds_update", "samples_per_s")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


@pytest.mark.parametrize("ranks", [1, 2])
def test_remote_reward_gives_the_same_run(tmp_path, ranks):
    root = Path(flow_grpo.__file__).parent
    command = [sys.executable, "-m", "rewards.serve", "--reward", "shapes", "jpeg", "--port", "0", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        urls = {}
        while len(urls) < 2:
            line = server.stdout.readline()
            assert line, "the server ended"
            if found := re.search(r"--reward (\S+/(\w+))$", line.strip()):
                urls[found[2]] = found[1]
        here, there = str(tmp_path / "here"), str(tmp_path / "there")
        remote = (f"{urls['shapes']}:0.7", f"{urls['jpeg']}:0.3")
        processes.run(train, [(here, ("shapes:0.7", "jpeg:0.3")), (there, remote)], ranks=ranks)
    finally:
        server.terminate()
        assert server.wait(timeout=20) == 0
    rows = metrics(tmp_path / "here")
    assert rows == metrics(tmp_path / "there") and len(rows) == 4
    assert {"reward/shapes", "reward/jpeg", "eval_strict"} <= {name for row in rows for name in row}
