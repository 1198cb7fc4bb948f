#!/usr/bin/env bash
# Trains the networks of a recipe and saves the checkpoints that a generator learns from; the same command continues.
#   bash scripts/rpg/collect.sh recipe=digits_cnn output=checkpoints/digits
#   bash scripts/rpg/collect.sh recipe=classinput_vittiny recipe.data.download=true processes=4 output=checkpoints/tasks
# Several machines with one file system run the same command and share the tasks. Options: python -m rpg.collect --help
set -euo pipefail
NPROC="${NPROC:-1}" # trainings run side by side by processes=N, not by torchrun
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch rpg.collect "$@"
