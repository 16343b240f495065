#!/usr/bin/env bash
# The whole story, small: set up, make data, search a topology in two ways, draw it, retrain it, segment, score and report.
#
#   bash quickstart.sh
#   TASK=Task04_Hippocampus DATA_ROOT=data_msd/Task04_Hippocampus bash quickstart.sh
#
# Environment (all optional):
#   TASK, DATA_ROOT    the dataset: Task00_Phantom, made on the spot, unless another one is named
#   OUTPUT_ROOT        folder for everything that is made (./runs/quickstart_TASK); running again continues there
#   SEARCH_ITERATIONS, CANDIDATE_ITERATIONS, TRAIN_ITERATIONS   the budget; more is better
#   FACTOR_RAM_COST    memory that the search aims at and candidates fill, as a share of every path's (0.5)
#   ACTIVE=1           use the active Python environment instead of .venv, see install.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export TASK="${TASK:-Task00_Phantom}" FOLD=0 NUM_FOLDS=4
export DATA_ROOT="${DATA_ROOT:-./data_msd/$TASK}"
results="${OUTPUT_ROOT:-./runs/quickstart_$TASK}"

step() { printf '\n== %s\n' "$*"; }

step "1 of 7: environment"
bash install.sh
if [[ "${ACTIVE:-0}" == 1 ]]; then
  PYTHON="${PYTHON:-$(command -v python || command -v python3)}"  # as install.sh
else
  PYTHON="${VENV:-.venv}/bin/python"
fi
export PYTHON

step "2 of 7: data"
if [[ "$TASK" == Task00_Phantom ]]; then "$PYTHON" -m dints.data.phantom --root "$DATA_ROOT"; fi
# shellcheck source=launch/launch.sh
source launch/launch.sh
require_data "$TASK" "$DATA_ROOT"

step "3 of 7: search by gradient descent"
# Epochs are scaled to the iterations: a third of them is warm-up. At half the resolution a step takes half the time:
# minutes have more of them.
memory="${FACTOR_RAM_COST:-0.5}"
space=(--num_blocks 4 --num_depths 3 --channel_mul 0.25 --use_downsample yes --overlap_ratio 0.25)
OUTPUT_ROOT="$results/search" FACTOR_RAM_COST="$memory" bash search_dints.sh \
  --recipe recommended "${space[@]}" --num_images_per_batch 2 --learning_rate_arch 0.02 \
  --num_iterations "${SEARCH_ITERATIONS:-100}" --num_epochs 100 --num_epochs_warmup 33 --num_epochs_per_validation 100

step "4 of 7: search by evolution"
# What was found competes at equal memory with a U shape and with mutants of the better one, in trainings of a quarter
# of the iterations.
(launch evolve_dints.py --root "$DATA_ROOT" --fold "$FOLD" --num_folds "$NUM_FOLDS" --output_root "$results/evolve" \
  --recipe recommended "${space[@]}" --factor_ram_cost "$memory" --arch_ckpt "$results"/search/search_code_*.pth \
  --candidates 4 --num_iterations "${CANDIDATE_ITERATIONS:-600}")
export ARCH_CKPT="$results/evolve/search_code_winner.pth"

step "5 of 7: drawing"
"$PYTHON" decode_plot.py --checkpoint "$ARCH_CKPT" --directory "$results" --filename architecture ||
  echo "the drawing's source is $results/architecture.gv"

step "6 of 7: retraining"
OUTPUT_ROOT="$results/train" bash train_dints.sh \
  --recipe recommended --num_images_per_batch 4 --learning_rate 0.05 \
  --num_iterations "${TRAIN_ITERATIONS:-800}" --num_epochs 100 --num_epochs_per_validation 34 --overlap_ratio 0.25

step "7 of 7: segmentation, scores and report"
"$PYTHON" infer_dints.py --checkpoint "$results/train/best_metric_model.pth" \
  --root "$DATA_ROOT" --fold "$FOLD" --num_folds "$NUM_FOLDS" --overlap_ratio 0.25 --output_root "$results/segmentations" \
  --report

step "done: what was made"
printf '%-24s %s\n' \
  architecture "$ARCH_CKPT" \
  "its drawing" "$results/architecture.png" \
  "the search's course" "$results/search/search.png $results/evolve/candidates.png" \
  "training curves" "$results/train/training_loss.png $results/train/validation_metric.png" \
  network "$results/train/best_metric_model.pth" \
  "segmentations, scores" "$results/segmentations/ $results/segmentations/scores.csv" \
  "all of it to look at" "$results/segmentations/report.html"
