#!/usr/bin/env bash
# Predicts the weights of a network with a trained hypernetwork and writes them as safetensors files.
#   bash scripts/logah/predict.sh target=gpt2-large checkpoint=runs/logah-gpt2 out=predictions/gpt2-large
#   bash scripts/logah/predict.sh target=llama-8b checkpoint=runs/logah-llama dtype=bf16 out=predictions/llama-8b
# Variables: scripts/lib.sh (one process is enough). Options: python -m logah.predict --help
set -euo pipefail
NPROC=1 # the hypernetwork is small: tensors are decoded faster than a disk takes them
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch logah.predict "$@"
