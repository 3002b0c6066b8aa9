#!/usr/bin/env bash
# From nothing to a forked algorithm, as README.md says it, in a fresh clone of what is committed here: flow_grpo.py is copied,
# the diff of docs/how_to.md stands for the editor, parent and fork are trained from tiny-flux with one seed, and infer.py
# compares them on the same held-out prompts and noise. At most 15 minutes on 4 CPU cores, with the packages of
# requirements.txt installed; prints how long it took. More flags go to both trainings:
#
#     runs/fork.sh                                            # results: runs/results/fork.json, assets/fork.png
#     runs/fork.sh --num-iterations 4 --eval-size 64          # a quick look; no results are kept
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
clone=$(mktemp -d)/clone
trap 'rm -rf "$(dirname "$clone")"' EXIT
SECONDS=0
git clone --quiet --no-hardlinks "$here" "$clone"
cd "$clone"

cp flow_grpo.py my_idea.py
awk '/^```/ { on = 0 } on { print } $0 == "```diff" { on = 1 }' docs/how_to.md > pages.diff    # all diffs of the page
git apply --include=my_idea.py --verbose pages.diff
diff flow_grpo.py my_idea.py || true

python flow_grpo.py --out outputs/parent "$@"
python my_idea.py --out outputs/fork "$@"
python infer.py --compare outputs/parent outputs/fork --prompts shapes --max-prompts 512 --reward shapes \
    --batch-size 64 --out outputs/compared
minutes=$(awk "BEGIN { printf \"%.1f\", $SECONDS / 60 }")

if [ $# -eq 0 ]; then
    cp outputs/compared/compare.png "$here/assets/fork.png"
    python - "$minutes" "$here/runs/results/fork.json" <<'PYTHON'
import json, os, platform, sys

import torch

from models import run_folder

result = {"cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
result |= {"minutes": float(sys.argv[1]), "compare": json.load(open("outputs/compared/compare.json"))["rewards"]}
for run in ("parent", "fork"):
    result[run] = [row["eval_strict"] for row in run_folder.rows(f"outputs/{run}") if "eval_strict" in row]
with open(sys.argv[2], "w") as f:
    json.dump(result, f, indent=1)
    f.write("\n")
PYTHON
fi
echo "from nothing to a fork, trained and compared with its parent: $minutes minutes"
