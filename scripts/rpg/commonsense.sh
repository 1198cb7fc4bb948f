#!/usr/bin/env bash
# Scores LoRA and DoRA adapters of a language model on commonsense tasks: generated ones against originals.
#   bash scripts/rpg/commonsense.sh language_model=MODEL originals=adapters generated=generated
# Variables: scripts/lib.sh. Options: python -m rpg.commonsense --help
set -euo pipefail
NPROC=1 # one process: adapters are scored one after another
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch rpg.commonsense "$@"
