#!/usr/bin/env bash
# Everything that needs a GPU, in at most 8 minutes, as one text file: GPU tests, then the kernel table.
#   bash benchmarks/gpu.sh [file]            (default: outputs/gpu.txt)
# What it writes goes into benchmarks/RESULTS.md.
set -uo pipefail
cd "$(dirname "$0")/.."
file="${1:-outputs/gpu.txt}"
mkdir -p "$(dirname "$file")"
python="${PYTHON:-python}"
{
    nvidia-smi
    echo "# GPU tests"
    timeout 180 "$python" -m pytest -q -o addopts= -m gpu --durations=5 tests
    echo "# Kernels"
    timeout 280 "$python" benchmarks/kernels.py
} 2>&1 | grep -v "measurements/s\]" | tee "$file"
