#!/bin/bash
# LTE on several nodes under SLURM, one head or more for each GPU, going on by itself after whatever stops it:
#
#     sbatch examples/slurm.sh
#
# A process that dies is started again by torchrun with its group. A node that fails or is preempted ends the job, SLURM
# queues it again, and the same command goes on from the newest checkpoint that any node has. OUT may lie on a shared
# disk or on each node's own; there every node keeps the whole run, and one disk may be lost.
#
# A model that is too large for one GPU lies in parts over those of a node, and each node trains heads of its own:
#
#     HEADS=8 ENGINE="--engine fsdp --workers nodes" sbatch examples/slurm.sh
#SBATCH --job-name=lte
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

OUT=${OUT:-runs/lte}
DATA=${DATA:-articles.csv}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=$((SLURM_NNODES * 8))
HEADS=${HEADS:-$gpus}

# The network between the nodes, where a node has several: export NCCL_SOCKET_IFNAME=eth0
export LOWRANK_TIMEOUT=${LOWRANK_TIMEOUT:-600}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun --ntasks-per-node=1 lowrank data prepare "$DATA" --tokenizer gpt2
srun --ntasks-per-node=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
    -m lowrank train gpt2-pretrain --data "$DATA" --data.tokenizer gpt2 --method lte --method.heads "$HEADS" ${ENGINE:-} \
    --batch-size "$((4 * gpus))" --precision bf16 --checkpoint-every 200 --elastic --out "$OUT"
