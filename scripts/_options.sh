# shellcheck shell=bash
#
# Sourced by the launch scripts beside it, under `set -euo pipefail`. `read_options "$@"` calls their
# `set_option OPTION VALUE` for each option that takes a value, which returns 1 for one that it does not know. It leaves
# the rest in `arguments`, and sets `dry_run` and, if the options ended with --, `ended`. `python` is the interpreter.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  [[ -x $here/../.venv/bin/python ]] && python=$here/../.venv/bin/python
fi

# The head of the script that was called.
usage() {
  sed -n '3,/^set /{s/^# \{0,1\}//p}' "$0"
}

fail() {
  echo "${0##*/}: $*; see --help" >&2
  exit 2
}

# shellcheck disable=SC2034  # the scripts read what it leaves
read_options() {
  local option value
  dry_run='' ended=''
  while (($#)) && [[ $1 == -* ]]; do
    option=$1
    shift
    case $option in
      --help | -h)
        usage
        exit
        ;;
      --dry-run)
        dry_run=yes
        continue
        ;;
      --)
        ended=yes
        break
        ;;
      --*=*)
        set -- "${option#*=}" "$@"
        option=${option%%=*}
        ;;
    esac
    (($#)) || fail "$option needs a value"
    value=$1
    shift
    set_option "$option" "$value" || fail "unknown option $option"
  done
  arguments=("$@")
}
