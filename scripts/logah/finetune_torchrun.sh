#!/usr/bin/env bash
# Trains a network from predictions and other starts on all GPUs of one machine, or of several; again: continues.
#   NPROC=8 bash scripts/logah/finetune_torchrun.sh recipe=vit_imagenet data.root=DIR 'inits=[random,hypernetwork:RUN]'
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 NPROC=8 bash scripts/logah/finetune_torchrun.sh recipe=gpt2 parallel=fsdp2 \
#       'inits=[prediction:DIR]'
#     ... and the same on the other machine with NODE_RANK=1 (run folder and predictions on a shared disk)
#   bash scripts/logah/finetune_torchrun.sh --check recipe=vit_cifar      # only shows and checks the command
# Variables: scripts/lib.sh. Options: python -m logah.finetune --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch logah.finetune "$@"
