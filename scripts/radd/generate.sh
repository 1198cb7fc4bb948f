#!/usr/bin/env bash
# Samples texts from a RADD model; NPROC=8 shares the texts between 8 processes, with the same result.
#   bash scripts/radd/generate.sh model_path=runs/first num_samples=4 steps=64 length=64
# Variables: scripts/lib.sh. Options: python -m radd.generate --help
set -euo pipefail
NPROC="${NPROC:-1}" # one process unless asked for
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch radd.generate "$@"
