# shellcheck shell=bash
#
# Sourced by the scripts beside it, under `set -euo pipefail`. `setup EXTRA` leaves in $root/.venv an ordinary install
# of this checkout, as it is now, with the dependencies of EXTRA, and in $python the interpreter to use.
#
# The first time this takes minutes, most of them for torch. PYTHON=/path/to/python chooses the interpreter.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python

# Only what is installed in .venv counts, whatever the shell's surroundings.
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Whether $1 is a Python that can make .venv. It is run, not looked up: version managers leave names that do not work.
suitable() {
  "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
  local name
  if [[ -n ${PYTHON:-} ]]; then
    if suitable "$PYTHON"; then
      echo "$PYTHON"
      return
    fi
    echo "PYTHON=$PYTHON is not a Python 3.10 or newer with venv and pip" >&2
    return 1
  fi
  for name in python3 python3.13 python3.12 python3.11 python3.10; do
    if suitable "$name"; then
      echo "$name"
      return
    fi
  done
  echo "no Python 3.10 or newer with venv and pip was found (on Debian and Ubuntu: apt install python3-venv);" \
    "set PYTHON to one" >&2
  return 1
}

make_venv() {
  local base
  if [[ -x $python ]] && suitable "$python" && "$python" -m pip --version >/dev/null 2>&1; then
    return
  fi
  base=$(find_python)
  echo "making .venv with $("$base" --version)"
  "$base" -m venv --clear "$venv"
}

setup() {
  local extra=$1 source=$venv/source stamp=$venv/installed-$1 wanted
  # pip would compile to bytecode on one core.
  local -a pip=("$python" -m pip install --no-compile --constraint "$root/constraints.txt")

  make_venv

  # Built from a copy: setuptools would leave build/ in the checkout, and install from it what was deleted since.
  rm -rf "$source"
  mkdir "$source"
  cp -R "$root"/{pyproject.toml,README.md,LICENSE,coordinator,workers} "$source"

  wanted=$(cat "$root"/{pyproject.toml,constraints.txt,scripts/_setup.sh} | cksum)
  if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    echo "installing logsync[$extra] into .venv"
    "${pip[@]}" setuptools
    "${pip[@]}" --no-build-isolation "${source}[$extra]"
    # Some packages hold files for another Python, which do not compile.
    "$python" -m compileall -q -j 0 "$venv"/lib/python3.*/site-packages >/dev/null || true
    echo "$wanted" >"$stamp"
  else
    # The dependencies are there; no package index is needed.
    "${pip[@]}" --quiet --no-build-isolation --no-deps --force-reinstall "$source"
  fi
  rm -rf "$source"
}
