#!/usr/bin/env bash
#
# Start this node's ranks of a job on several nodes. Run the same command on every node, in any order:
#
#   scripts/torchrun_node.sh --nnodes 2 --nproc-per-node 8 --rdzv-endpoint node0 train.py ARGUMENTS
#
#   --nnodes N|MIN:MAX      nodes of the job (1)
#   --nproc-per-node N      ranks on this node (1)
#   --rdzv-endpoint HOST[:PORT]   where the nodes meet: one of them, by a name that all know (this machine, port 29400)
#   --rdzv-id ID            the job's name, the same on every node (logsync)
#   --max-restarts N        how often a failed job starts again, from its checkpoint (3)
#   --join-timeout S        seconds that nodes wait for each other, at the start and after a failure (600)
#   --dry-run               show the command and its environment, and start nothing
#
# Ranks meet on the interface that leads to HOST, unless GLOO_SOCKET_IFNAME names another. PYTHON is the interpreter
# (.venv's, or python3). A node that was lost may come back: start it again with the same command.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=_options.sh
source "$(dirname "${BASH_SOURCE[0]}")/_options.sh"

nnodes=1 ranks=1 endpoint='' id=logsync restarts=3 join_timeout=600
set_option() {
  case $1 in
    --nnodes) nnodes=$2 ;;
    --nproc-per-node) ranks=$2 ;;
    --rdzv-endpoint) endpoint=$2 ;;
    --rdzv-id) id=$2 ;;
    --max-restarts) restarts=$2 ;;
    --join-timeout) join_timeout=$2 ;;
    *) return 1 ;;
  esac
}
read_options "$@"
set -- ${arguments[@]+"${arguments[@]}"}
(($#)) || fail "no script was given"
[[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "--nnodes takes a number or MIN:MAX, given $nnodes"
[[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "--nproc-per-node takes a number, given $ranks"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--max-restarts takes a number, given $restarts"
[[ $join_timeout =~ ^[1-9][0-9]*$ ]] || fail "--join-timeout takes whole seconds, given $join_timeout"
if [[ -z $endpoint ]]; then
  # Each node would wait for the others at its own door.
  [[ ${nnodes#*:} == 1 ]] || fail "--nnodes $nnodes needs --rdzv-endpoint"
  endpoint=localhost
fi
host=${endpoint%:*} port=29400
[[ $endpoint == *:* ]] && port=${endpoint##*:}

# What is set already stays.
environment=()
default() {
  [[ -n ${!1:-} ]] || environment+=("$1=$2")
}

options=()
if [[ ${nnodes#*:} == 1 ]]; then
  default GLOO_SOCKET_IFNAME lo
  options+=(--local-addr 127.0.0.1)
else
  read -r interface address < <("$python" "$here/_address.py" "$host") || true
  if [[ -n ${interface:-} ]]; then
    default GLOO_SOCKET_IFNAME "$interface"
    # Else the nodes would look for rank 0 under its host name.
    options+=(--local-addr "$address")
  else
    echo "torchrun_node.sh: no interface was found that leads to $host; set GLOO_SOCKET_IFNAME if ranks do not meet" >&2
  fi
fi
# torchrun's own default is 1.
threads=$(($(nproc) / ranks))
default OMP_NUM_THREADS $((threads > 0 ? threads : 1))
# Restarted gloo ranks would find the addresses of their dead predecessors in the store that torchrun shares with them.
default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1

command=("$python" -m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$ranks"
  --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "$id" --rdzv-conf "join_timeout=$join_timeout"
  --max-restarts "$restarts" ${options[@]+"${options[@]}"} -- "$@")

if [[ -n $dry_run ]]; then
  ((${#environment[@]})) && printf '%q ' "${environment[@]}"
  printf '%q ' "${command[@]}"
  echo
  exit
fi
exec env ${environment[@]+"${environment[@]}"} "${command[@]}"
