#!/bin/bash
# One run on two nodes of 8 GPUs, a task for each GPU. In the folder of this repository:
#   sbatch experiments/launch/slurm.sh
# Change: the options below and the config. Sweeps need no file: python -m vit_jax sweep
# FILE --launcher=slurm writes one like this for each point.
#SBATCH --job-name=plain_s16
#SBATCH --output=%x.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=8:00:00
# What Slurm preempts it queues again; and two minutes before its time is up, the run is told to
# save, ends with 143, and is queued again below.
#SBATCH --requeue
#SBATCH --signal=TERM@120

PATH=$PWD/.venv/bin:$PATH
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  python -m vit_jax train \
  --config=configs/plain.py:S/16,imagenet \
  --workdir=runs/plain_s16 \
  --config.precision=bfloat16
code=$?
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
