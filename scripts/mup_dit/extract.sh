#!/usr/bin/env bash
# Caches latents and caption features; NPROC=8 shares the shards between 8 processes. The same command goes on.
#   bash scripts/mup_dit/extract.sh dataset=imagefolder:imagenet vae=ema flips=true output=features/imagenet256
# Variables: scripts/lib.sh. Options: python -m mup_dit.extract --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch mup_dit.extract "$@"
