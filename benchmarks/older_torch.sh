#!/usr/bin/env bash
# Run the tests that are not slow, and compile, on the oldest PyTorch that is supported, in an environment of its own.
# CI does not.
#
#   bash benchmarks/older_torch.sh                      all of them
#   bash benchmarks/older_torch.sh tests/training -x    arguments go to pytest
#
# Environment (optional):
#   TORCH   the version (2.11.0)
#   VENV    where its environment is made (.venv_torch_2.11.0); it takes 6 GB where only PyPI's CUDA build can be had
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export TORCH="${TORCH:-2.11.0}"
export VENV="${VENV:-.venv_torch_$TORCH}"
bash tests/run.sh --quick "$@"
# Slow, but PyTorch's compiler is what differs most.
OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest -k one_graph tests/network
