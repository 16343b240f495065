#!/usr/bin/env bash
# Set up the environment, then lint and test everything. Real cases are used where DINTS_TASK04 (or ../shared/data/...)
# names a folder that holds Task04_Hippocampus; tests that need them say so where it does not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh
# shellcheck disable=SC1091
source "${VENV:-.venv}/bin/activate"
ruff check .
ruff format --check .
python -m pytest "$@"
