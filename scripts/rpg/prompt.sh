#!/usr/bin/env bash
# From a sentence to a classifier; without a sentence it asks for one after another until `exit`.
#   bash scripts/rpg/prompt.sh "select all living things" generator=runs/tasks test=true
#   CHAT_MODEL=Qwen/Qwen2.5-3B-Instruct bash scripts/rpg/prompt.sh generator=runs/tasks
# Variables: CHAT_MODEL (rules), and PYTHON as in scripts/lib.sh. Options: python -m rpg.prompt --help
set -euo pipefail
CHAT_MODEL="${CHAT_MODEL:-rules}" # chat model, or the table of words
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
arguments=()
check=false
for argument in "$@"; do
  if [[ "${argument}" == --check ]]; then check=true; else arguments+=("${argument}"); fi
done
command=("${PYTHON}" -m rpg.prompt "chat_model=${CHAT_MODEL}" "${arguments[@]}")
show_command "${command[@]}"
if [[ "${check}" == true ]]; then
  "${command[@]}" --cfg job >/dev/null
else
  exec "${command[@]}" # not in the background: the session reads from the terminal
fi
