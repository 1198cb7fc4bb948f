#!/usr/bin/env bash
# Trains a hypernetwork on all GPUs of one machine, or of several; run it again to continue.
#   NPROC=4 bash scripts/logah/train_torchrun.sh experiment=cifar100_small nets.meta_batch=4
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 NPROC=1 bash scripts/logah/train_torchrun.sh experiment=wikitext103_gpt2_tiny
#     ... and the same on the other machine with NODE_RANK=1 (run folder on a shared disk)
#   bash scripts/logah/train_torchrun.sh --check experiment=digits_minutes     # only shows and checks the command
# Variables: scripts/lib.sh. Options: python -m logah.train --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch logah.train "$@"
