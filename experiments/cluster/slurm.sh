#!/bin/bash
# One process a node with all of its GPUs: sbatch experiments/cluster/slurm.sh
# A run that is preempted saves (SIGTERM comes 120 s before the end) and is put into the queue again.
#SBATCH --job-name=supcon
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=supcon-%j.log

WORKDIR=${WORKDIR:-$PWD/runs/resnet50}  # a folder that all nodes see

srun --kill-on-bad-exit=1 bash -c '
  # JAX takes one GPU a task from SLURM unless it is told that the task has them all.
  export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  exec python -m supcon_jax.train --config resnet50 --distributed "$@"
' train --workdir="$WORKDIR" "$@"
status=$?
[ $status -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"  # stopped by SIGTERM, and saved
exit $status
