#!/usr/bin/env bash
#
# Run a command as a job of a Ray cluster, follow its output, and exit as it does:
#
#   scripts/ray_submit.sh -- python train.py ARGUMENTS
#
#   --address URL           the cluster's dashboard (RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265)
#   --working-dir DIR       what is sent along, and where the command runs (the folder you are in)
#   --wheel FILE            a wheel of logsync to install for the job, where the cluster's image has none
#   --submission-id ID      the job's name (logsync- and the time); one that exists already is only followed
#   --dry-run               show the command, and submit nothing
#
# It needs ray[default]; PYTHON is its interpreter (.venv's, or python3). The job goes on if this script is ended.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=_options.sh
source "$(dirname "${BASH_SOURCE[0]}")/_options.sh"

address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265} folder=$PWD wheel='' id=logsync-$(date +%Y%m%d-%H%M%S)
set_option() {
  case $1 in
    --address) address=$2 ;;
    --working-dir) folder=$2 ;;
    --wheel) wheel=$2 ;;
    --submission-id) id=$2 ;;
    *) return 1 ;;
  esac
}
read_options "$@"
set -- ${arguments[@]+"${arguments[@]}"}
(($#)) || fail "no command was given"
[[ -n $ended ]] || fail "the job's command stands after --, given $1"
[[ $address == http://* || $address == https://* ]] || fail "--address takes the dashboard's URL, given $address"
[[ -d $folder ]] || fail "--working-dir $folder is no folder"

ray=("$python" -m ray.scripts.scripts job)
options=()
if [[ -n $wheel ]]; then
  [[ -f $wheel ]] || fail "--wheel $wheel is no file"
  environment=$("$python" -c 'import json, os, sys; print(json.dumps({"py_modules": [os.path.abspath(sys.argv[1])]}))' "$wheel")
  options+=(--runtime-env-json "$environment")
fi
command=("${ray[@]}" submit --address "$address" --submission-id "$id" --working-dir "$folder"
  ${options[@]+"${options[@]}"} -- "$@")

if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
if "${ray[@]}" status --address "$address" "$id" >/dev/null 2>&1; then
  "${ray[@]}" logs --address "$address" --follow "$id"
  "${ray[@]}" status --address "$address" "$id" | grep succeeded
  exit
fi
exec "${command[@]}"
