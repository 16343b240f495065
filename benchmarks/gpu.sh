#!/usr/bin/env bash
# Check and measure all that only a GPU can show, in at most 9 minutes, without a network: benchmarks/gpu.py says what.
#
# Where packages are missing and cannot be had, bring their wheels in .wheels beside the checkout's README.md:
#   grep -E '^(monai|nibabel|graphviz|pydicom)==' requirements.txt >wheels.txt
#   python -m pip download --no-deps -d .wheels -r wheels.txt
# There:
#   bash benchmarks/gpu.sh                       arguments go to benchmarks/gpu.py
#
# Environment (optional):
#   OUT     where results.json is written, as it grows (.)
#   PYTHON  the one that has torch, 2.11 to 2.13 (python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
site=${TMPDIR:-/tmp}/dints_site
if compgen -G '.wheels/*.whl' >/dev/null; then
    "$python" -m pip install --quiet --upgrade --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
        .wheels/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" benchmarks/gpu.py --output "${OUT:-.}/results.json" "$@"
