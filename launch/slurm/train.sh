#!/bin/bash
# A recipe on a SLURM cluster: one `accelerate launch` on each machine, one process for each of its GPUs.
#   sbatch --nodes=1 launch/slurm/train.sh RECIPE [ENGINE] [section.key=value ...]     from the root of the repository
# ENGINE is ddp (by default), zero2, zero3 or fsdp2. Before its time is up the job gets SIGTERM, at which a run leaves a
# checkpoint and ends; `RESUME=1 sbatch ...` goes on from it. `out` must be a folder that all see.
# Account, partition and environment are your cluster's: give them to sbatch, and activate yours before you submit.
#SBATCH --job-name=vggrpo
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=runs/slurm-%j.log
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch --nodes=N launch/slurm/train.sh RECIPE [ENGINE] [section.key=value ...]" >&2
    exit 2
fi
export RECIPE=$1 ENGINE=${2:-ddp}
shift $(($# < 2 ? 1 : 2))
export NODES=${SLURM_NNODES:-1} GPUS=${SLURM_GPUS_ON_NODE:-8} PORT=${PORT:-29500}
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")  # no `| head`: who is still writing to it is killed, and so is the job
export HOST=${HOSTS%%$'\n'*}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# One line on each machine; SLURM_NODEID is that machine's own.
srun --kill-on-bad-exit=1 bash -c '
    exec python -m vggrpo train "$RECIPE" "$@" --accelerate "$ENGINE" ${RESUME:+--resume} \
        --num_processes $((NODES * GPUS)) --num_machines "$NODES" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$HOST" --main_process_port "$PORT"
' train "$@"
