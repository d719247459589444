#!/bin/bash
# Trains a stage on two nodes of 8 GPUs; data/ and out/ lie on a file system that both see.
#     sbatch assets/slurm.sh --stage 2 --compile --codes codes        # and again with --resume, when its time was over
#SBATCH --job-name=mentor
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=48:00:00
#SBATCH --signal=TERM@600              # ten minutes before the end: finish the step, save, leave
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --shutdown-timeout 600 --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d --rdzv_endpoint="$first:29500" train.py "$@"
