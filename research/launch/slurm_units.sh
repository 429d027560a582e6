#!/usr/bin/env bash
# Run the units of an experiment apart, one GPU each, then together: what is finished is skipped.
#   run="architecture/gqa --scale=gpu --workdir=/shared/gqa"
#   units=$(ablate run $run --list-units | wc -l)
#   job=$(sbatch --parsable --array=1-$units slurm_units.sh $run)
#   sbatch --dependency=afterok:$job slurm_units.sh $run
# All nodes must see the workdir.
#SBATCH --job-name=ablate-units
#SBATCH --output=%x-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
set -euo pipefail

unit=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    lines=$(ablate run "$@" --list-units)
    read -ra unit <<<"$(sed -n "${SLURM_ARRAY_TASK_ID}p" <<<"$lines")"
    if [ "${#unit[@]}" -eq 0 ]; then
        echo "there is no unit $SLURM_ARRAY_TASK_ID" >&2
        exit 2
    fi
fi
status=0
srun --cpu-bind=none ablate run "$@" "${unit[@]}" || status=$?
if [ "$status" -eq 143 ]; then # stopped by SIGTERM, and not done
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
