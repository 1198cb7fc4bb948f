#!/usr/bin/env bash
# Samples images from a DiT, PixArt-alpha or MMDiT model; NPROC=8 shares them between 8 processes, with the same result.
#   bash scripts/mup_dit/sample.sh model_path=runs/digits num_samples=64 output=runs/digits/samples
#   NPROC=8 bash scripts/mup_dit/sample.sh model_path=runs/xl vae=stabilityai/sd-vae-ft-mse num_samples=50000 output=runs/xl/samples
# Variables: scripts/lib.sh. Options: python -m mup_dit.sample --help
set -euo pipefail
NPROC="${NPROC:-1}" # one process unless asked for
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch mup_dit.sample "$@"
