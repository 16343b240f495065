#!/usr/bin/env bash
# Stage 2: retrain a found architecture. As published: Task09_Spleen, fold 0 of 5.
#
#   bash train_dints.sh
#   TASK=Task04_Hippocampus ARCH_CKPT=runs/search/search_code_600.pth bash train_dints.sh --num_epochs 400
#   FOLD=each bash train_dints.sh
#
# FOLD=each trains all folds, one after another, and scores every case by the fold that did not train on it.
# ARCH_CKPT is the newest search_code_*.pth of this TASK under ./runs unless it is set. With FOLD=each it may contain
# {fold}, in place of which comes the fold's number.
# Further arguments go to train_dints.py (-h lists them); launch/launch.sh says which variables choose devices and nodes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch/launch.sh"

TASK="${TASK:-Task09_Spleen}"
DATA_ROOT="${DATA_ROOT:-./data_msd/$TASK}"
require_data "$TASK" "$DATA_ROOT"

# newest FILE ...: print that of these which was written last.
newest() {
  local file found=""
  for file in "$@"; do
    if [[ -f "$file" && (-z "$found" || "$file" -nt "$found") ]]; then found="$file"; fi
  done
  printf '%s' "$found"
}

if [[ -z "${ARCH_CKPT:-}" ]]; then
  # Folders as search_dints.sh and quickstart.sh name them. No letter or digit follows TASK: Task1 is not Task10.
  own=(./runs/{search,evolve}_"$TASK"{,[!0-9A-Za-z]*}/search_code_*.pth)
  own+=(./runs/quickstart_"$TASK"/{search,evolve}/search_code_*.pth)
  ARCH_CKPT="$(newest "${own[@]}")"
  if [[ -z "$ARCH_CKPT" ]]; then
    other="$(newest ./runs/{*,*/search,*/evolve}/search_code_*.pth)"
    {
      echo "error: no search_code_*.pth of $TASK under ./runs: run search_dints.sh with TASK=$TASK, or set ARCH_CKPT"
      again='TASK=%q ARCH_CKPT=%q bash train_dints.sh\n'
      # shellcheck disable=SC2059  # the format is ours
      if [[ -n "$other" ]]; then printf "  the newest of another search: $again" "$TASK" "$other"; fi
      echo "  the paper's is arch_code_cvpr.pth in automl/DiNTS of https://github.com/Project-MONAI/tutorials;"
      # shellcheck disable=SC2059
      printf "  with it: $again" "$TASK" arch_code_cvpr.pth
    } >&2
    exit 1
  fi
  echo "ARCH_CKPT is $ARCH_CKPT, the newest of $TASK"
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
