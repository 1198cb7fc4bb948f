#!/usr/bin/env bash
# Samples texts from a RADD model.
#   bash scripts/radd/generate.sh model_path=runs/first num_samples=4 steps=64 length=64
# Variables: scripts/lib.sh. Options: python -m radd.generate --help
set -euo pipefail
NPROC="${NPROC:-1}" # one process unless asked for: sampling does not share a batch out by itself
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch radd.generate "$@"
