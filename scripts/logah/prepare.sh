#!/usr/bin/env bash
# Downloads and prepares data once, e.g. on a machine with a network, for runs on machines without one.
#   bash scripts/logah/prepare.sh data=cifar100 data.download=true data.root=/shared/images
#   bash scripts/logah/prepare.sh data=openwebtext data.cache_dir=/shared/data
# Options: python -m logah.prepare --help
set -euo pipefail
NPROC=1 # tokenizers use all cores of one process
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
launch logah.prepare "$@"
