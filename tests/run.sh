#!/usr/bin/env bash
# Set up the environment, then lint and test everything, in two processes side by side.
#
#   bash tests/run.sh                          everything
#   bash tests/run.sh --quick                  without the tests that are marked slow
#   bash tests/run.sh -n 0 -k loss tests/data  arguments go to pytest
#
# Environment (optional):
#   DINTS_TASK04   folder of the real Task04_Hippocampus (../shared/data/Task04_Hippocampus); tests that need it say so
#                  where it is absent
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A file's tests share what they set up, so a file is one process's; those with slow tests come first (conftest.py).
arguments=(-n 2 --dist loadfile --no-loadscope-reorder)
for argument in "$@"; do
    if [[ $argument == --quick ]]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
done

bash install.sh
# shellcheck disable=SC1091
source "${VENV:-.venv}/bin/activate"
ruff check .
ruff format --check .
# The processes share the cores; a test that needs several threads asks for them.
OMP_NUM_THREADS=1 python -m pytest "${arguments[@]}"
