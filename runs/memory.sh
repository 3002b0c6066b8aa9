#!/usr/bin/env bash
# Peak resident memory of the runs under "Measured" in docs/recipes.md, Python and torch included: of their first two
# iterations, with the whole of their evaluations, checkpoints and export. Linux; three minutes on 4 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python - <<'PYTHON'
import json
import os
import platform
import subprocess
import sys
import tempfile

import torch

RUNS = {
    "python flow_grpo.py": [],
    "python dance_grpo.py": [],
    "python rloo.py": [],
    "python rloo.py --lm tiny-qwen-vl": [],
    "python remax.py": [],
    "python pretrain.py": [],
    "python pretrain.py --model tiny-metaquery-start": [],
    "runs/tiny_flux.sh": "pretrain.py --model assets/tiny-flux --num-steps 8".split(),  # its second command
    "python grpo_unified.py": [],
    "python grpo_unified.py --train lm": [],
}
found = {}
for name, command in RUNS.items():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(command or name.split()[1:]), "--num-iterations", "2", "--out", f"{folder}/run"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"error: {name}:\n{errors[-2000:]}")
        found[name] = round(usage.ru_maxrss / 2**20, 3)  # KiB on Linux
        print(f"{found[name]:7.2f} GiB  {name}", flush=True)
result = {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(), "gib": found}
with open("runs/results/memory.json", "w") as f:
    json.dump(result, f, indent=1)
    f.write("\n")
PYTHON
