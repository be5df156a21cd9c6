#!/usr/bin/env bash
# One run of `ppcl compress` on several machines of a SLURM cluster.
#
#   ppcl recipes show slurm > job.sh        then change what is marked, and: sbatch job.sh
#
# SLURM starts one task on each machine; each task starts torchrun, which starts one process for each GPU. A process
# that dies ends the run on all machines within a minute, and torchrun begins it again, twice at most: what is finished
# is kept. What SLURM itself ends (time, preemption) goes on when the same job is submitted again.

#SBATCH --job-name=ppcl
#SBATCH --nodes=2                   # CHANGE: machines
#SBATCH --ntasks-per-node=1         # one torchrun on each, whatever the number of its GPUs
#SBATCH --gpus-per-node=8           # CHANGE: GPUs of a machine
#SBATCH --cpus-per-task=64          # CHANGE: what a machine has; its processes share them
#SBATCH --mem=0                     # all memory of a machine: a teacher is read once for each of its GPUs
#SBATCH --time=24:00:00             # CHANGE: `ppcl plan` estimates it
#SBATCH --requeue                   # begun again after a failure of a machine
#SBATCH --output=ppcl-%j.log

set -euo pipefail

# CHANGE: where the package is installed, the same on all machines.
# source /shared/venv/bin/activate

RECIPE=${RECIPE:-flux_8b}           # CHANGE: a shipped recipe, or a YAML file
OUT=${OUT:-runs/flux_8b}            # CHANGE: a folder that all machines see: one run, one folder
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-8}}
PORT=${PORT:-29500}                 # CHANGE where it is taken

# Where these machines reach no network: fetch the teacher before, on one that does, into a cache that all see.
# export HF_HUB_OFFLINE=1

mapfile -t MACHINES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_PER_TASK / PROCESSES))}

exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" \
  --nproc-per-node="$PROCESSES" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="${MACHINES[0]}:$PORT" \
  --rdzv-id="$SLURM_JOB_ID" \
  --max-restarts=2 \
  -m ppcl_toolkit.cli compress --recipe "$RECIPE" --out "$OUT" "$@"
