#!/usr/bin/env bash
# Stage 2: retrain a found architecture. As published: Task09_Spleen, fold 0 of 5.
#
#   bash train_dints.sh
#   TASK=Task04_Hippocampus ARCH_CKPT=runs/search/search_code_600.pth bash train_dints.sh --num_epochs 400
#   FOLD=each bash train_dints.sh
#
# FOLD=each trains all folds, one after another, and scores every case by the fold that did not train on it.
# ARCH_CKPT is the newest search_code_*.pth under ./runs unless it is set.
# Further arguments go to train_dints.py (-h lists them); launch/launch.sh says which variables choose devices and nodes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch/launch.sh"

TASK="${TASK:-Task09_Spleen}"
DATA_ROOT="${DATA_ROOT:-./data_msd/$TASK}"
require_data "$TASK" "$DATA_ROOT"

if [[ -z "${ARCH_CKPT:-}" ]]; then
  # shellcheck disable=SC2012  # the names are ours: no newline, no glob character
  ARCH_CKPT="$(ls -t ./runs/*/search_code_*.pth 2>/dev/null | head -n 1 || true)"
  if [[ -z "$ARCH_CKPT" ]]; then
    echo "error: no search_code_*.pth under ./runs: run search_dints.sh first, or set ARCH_CKPT to an architecture file" >&2
    exit 1
  fi
fi

if [[ "${FOLD:-0}" == each ]]; then
  export TASK DATA_ROOT ARCH_CKPT OUTPUT_ROOT="${OUTPUT_ROOT:-./runs/train_${TASK}_folds}"
  exec "$(choose_python)" -P "$here/launch/folds.py" "$@"
fi

launch train_dints.py \
  --arch_ckpt "$ARCH_CKPT" \
  --root "$DATA_ROOT" \
  --fold "${FOLD:-0}" \
  --num_folds "${NUM_FOLDS:-5}" \
  --output_root "${OUTPUT_ROOT:-./runs/train_${TASK}_fold${FOLD:-0}}" \
  "$@"
