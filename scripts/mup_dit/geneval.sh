#!/usr/bin/env bash
# GenEval of a text-to-image model: samples four images of each prompt, then scores them. Both parts continue after a stop.
#   bash scripts/mup_dit/geneval.sh model_path=runs/pixart vae=stabilityai/sd-vae-ft-ema sampling.cfg_scale=4.5
#   PROMPTS=evaluation_metadata.jsonl OUTPUT=runs/pixart/geneval NPROC=8 bash scripts/mup_dit/geneval.sh model_path=runs/pixart
# Arguments go to mup_dit.sample. Variables, besides those of scripts/lib.sh:
#   PROMPTS     GenEval's prompts/evaluation_metadata.jsonl (evaluation_metadata.jsonl)
#   OUTPUT      folder of the images; scores go to OUTPUT_scores (geneval)
#   PER_PROMPT  images of a prompt (4)
#   SCORE_ARGS  options of mup_dit.evaluate, for example "geneval.detector=FOLDER geneval.colours=FOLDER"
set -euo pipefail
NPROC="${NPROC:-1}" # one process unless asked for
PROMPTS="${PROMPTS:-evaluation_metadata.jsonl}"
OUTPUT="${OUTPUT:-geneval}"
PER_PROMPT="${PER_PROMPT:-4}"
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

launch mup_dit.sample layout=geneval format=png resume=true seed=42 "prompts=${PROMPTS}" "output=${OUTPUT}" \
  "samples_per_prompt=${PER_PROMPT}" "$@"

scoring=()
for argument in "$@"; do
  if [[ "${argument}" == --check ]]; then scoring+=(--check); fi
done
# shellcheck disable=SC2206 - SCORE_ARGS holds several words on purpose
scoring+=(${SCORE_ARGS:-})
launch mup_dit.evaluate "samples=${OUTPUT}" "metrics=[geneval]" "work_dir=${OUTPUT}_scores" "${scoring[@]}"
