#!/usr/bin/env bash
# Both stages as two jobs: SAM starts when MAE has ended well, and takes its encoder's weights from MAE's run.
#
#   launch/pretrain_then_sam.sh                                             # the two recipes as they are
#   launch/pretrain_then_sam.sh run_dir=runs/mae_2 -- run_dir=runs/sam_2    # settings of stage 1 -- of stage 2
#   MAE_SBATCH="--nodes=4" SAM_SBATCH="--nodes=8" launch/pretrain_then_sam.sh
#
# MAE_CONFIG and SAM_CONFIG name other configs; ENGINE goes to both. A requeued MAE job keeps its number, so SAM waits
# through all its restarts; if MAE fails, SAM never starts (sbatch's --kill-on-invalid-dep takes it off the queue).
set -euo pipefail
cd "$(dirname "$0")/.."

MAE_CONFIG=${MAE_CONFIG:-launch/configs/mae_vith.yaml}
SAM_CONFIG=${SAM_CONFIG:-launch/configs/sam_vith.yaml}
mae_overrides=()
sam_overrides=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    mae_overrides+=("$1")
    shift
done
if [ "${1:-}" = -- ]; then
    shift
    sam_overrides=("$@")
fi

# Both are looked at now: a wrong setting of stage 2 would else show after stage 1, in days.
PYTHON=${PYTHON:-.venv/bin/python}
mae_run_dir=$("$PYTHON" -m trainer.preflight "$MAE_CONFIG" ${mae_overrides[@]+"${mae_overrides[@]}"} --print-run-dir)
sam_overrides=("model.init_from=$mae_run_dir" ${sam_overrides[@]+"${sam_overrides[@]}"})
"$PYTHON" -m trainer.preflight "$SAM_CONFIG" "${sam_overrides[@]}" --print-run-dir > /dev/null

# The options are words on purpose: several of them, split at blanks.
# shellcheck disable=SC2086
mae=$(CONFIG=$MAE_CONFIG sbatch --parsable ${MAE_SBATCH:-} launch/mae_vith.slurm ${mae_overrides[@]+"${mae_overrides[@]}"})
mae=${mae%%;*}                                       # a federation appends its cluster's name
# shellcheck disable=SC2086
sam=$(CONFIG=$SAM_CONFIG sbatch --parsable --dependency=afterok:"$mae" --kill-on-invalid-dep=yes ${SAM_SBATCH:-} \
    launch/sam_vith.slurm "${sam_overrides[@]}")
echo "MAE is job $mae; SAM is job ${sam%%;*}, waits for it and starts from $mae_run_dir"
