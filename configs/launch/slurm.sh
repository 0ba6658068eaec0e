#!/usr/bin/env bash
# One run over the GPUs of several SLURM nodes; a preempted or timed-out job goes back into the queue.
#
#   sbatch --nodes 4 configs/launch/slurm.sh spacedrive_plus_qwen_7b runs/first --mesh.data 4 --mesh.fsdp 8 \
#       --model.weights WEIGHTS --data.records RECORDS
#
# jax counts a node as a slice: data goes over the nodes, fsdp stays on the links inside one. A model that does
# not fit a node's memory takes --mesh.data 1 --mesh.fsdp 32, and sends its weights over the network.
# All nodes need the same checkout, environment and records, and the run folder must be on a shared disk.
#SBATCH --job-name=spacedrive
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM, to every task, five minutes before the end: the run saves and stops.
#SBATCH --signal=TERM@300
set -euo pipefail
config=$1 run_dir=$2
shift 2

# srun does not pass the job's --cpus-per-task on by itself (SLURM 22.05 and newer): one core would make samples.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# A task owns all GPUs of its node; jax finds the coordinator and the host numbers in SLURM's environment.
srun --kill-on-bad-exit=1 .venv/bin/python -m spacedrive_jax train "$config" --run-dir "$run_dir" --resume \
    --coordinator auto --json "$@" | tee "$run_dir.$SLURM_JOB_ID.log"

# The last line says whether the run got to its last step.
if ! grep '^{' "$run_dir.$SLURM_JOB_ID.log" | tail -n 1 | grep -q '"finished": true'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
