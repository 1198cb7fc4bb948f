#!/usr/bin/env bash
# Sets up the environment and reproduces the papers at small scale on embedded real data (no download).
#   bash scripts/quickstart.sh          every paper that has a reproduction
#   bash scripts/quickstart.sh radd     one paper
#   bash scripts/quickstart.sh --check  only prints what would run
# Results: runs/quickstart/report.html and a table on the terminal. Run it again to continue an interrupted one.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "${QUINTET_ROOT}"

OUTPUT="${OUTPUT:-runs/quickstart}"
check=false
papers=()
for argument in "$@"; do
  case "${argument}" in
    --check) check=true ;;
    -h | --help) sed -n '2,6p' "${BASH_SOURCE[0]}" && exit 0 ;;
    *)
      if [[ ! -f "${argument}/reproduce.py" ]]; then
        echo "quickstart: '${argument}' has no reproduction; choose of: $(ls */reproduce.py | xargs -n1 dirname | xargs)" >&2
        exit 2
      fi
      papers+=("${argument}")
      ;;
  esac
done
if [[ ${#papers[@]} -eq 0 ]]; then
  for module in */reproduce.py; do papers+=("$(dirname "${module}")"); done
fi

status=0
for paper in "${papers[@]}"; do
  command=("${PYTHON}" -m "${paper}.reproduce" --output "${OUTPUT}/${paper}")
  echo "quickstart: ${command[*]}"
  if [[ "${check}" == false ]]; then "${command[@]}" || status=$?; fi
done
page=("${PYTHON}" -m common.report.quickstart "${OUTPUT}")
echo "quickstart: ${page[*]}"
if [[ "${check}" == false ]]; then "${page[@]}"; fi
exit "${status}"
