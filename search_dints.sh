#!/usr/bin/env bash
# Stage 1: search an architecture. As published: Task07_Pancreas, fold 4 of 5, RAM factor 0.8.
#
#   bash search_dints.sh
#   TASK=Task09_Spleen FOLD=0 FACTOR_RAM_COST=0.5 bash search_dints.sh --num_epochs 400 --num_epochs_warmup 200
#
# Further arguments go to search_dints.py (-h lists them); launch/launch.sh says which variables choose devices and nodes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch/launch.sh"

TASK="${TASK:-Task07_Pancreas}"
DATA_ROOT="${DATA_ROOT:-./data_msd/$TASK}"
require_data "$TASK" "$DATA_ROOT"

launch search_dints.py \
  --root "$DATA_ROOT" \
  --fold "${FOLD:-4}" \
  --num_folds "${NUM_FOLDS:-5}" \
  --factor_ram_cost "${FACTOR_RAM_COST:-0.8}" \
  --output_root "${OUTPUT_ROOT:-./runs/search_${TASK}_fold${FOLD:-4}_ram${FACTOR_RAM_COST:-0.8}}" \
  "$@"
