#!/usr/bin/env bash
# Train the units of an experiment, each over all nodes of the job: a process a node, with its GPUs.
#   sbatch --nodes=4 slurm.sh architecture/gqa --scale=gpu --workdir=/shared/gqa
# What follows slurm.sh are the words of `ablate run`; all nodes must see the workdir. `ablate` must
# be on the PATH of whoever submits.
#SBATCH --job-name=ablate
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --requeue
# Three minutes before the time is up, save; the processes agree on a step when they log.
#SBATCH --signal=TERM@180
set -euo pipefail

export ABLATE_DISTRIBUTED=1
status=0
# One task would be bound to one core, which cannot feed eight GPUs.
srun --kill-on-bad-exit=1 --cpu-bind=none ablate run "$@" || status=$?
if [ "$status" -eq 143 ]; then # stopped by SIGTERM, and not done
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
