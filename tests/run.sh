#!/usr/bin/env bash
# Set up the environment, then lint and test everything. Arguments go to pytest.
#
# Environment (optional):
#   DINTS_TASK04   folder of the real Task04_Hippocampus (../shared/data/Task04_Hippocampus); tests that need it say so
#                  where it is absent
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh
# shellcheck disable=SC1091
source "${VENV:-.venv}/bin/activate"
ruff check .
ruff format --check .
python -m pytest "$@"
