# Sourced by the scripts beside it: makes .venv and installs this project's extras into it.
# shellcheck shell=bash

# Prints a command as a reader can repeat it, then runs it.
run() {
  printf '\n$ %s\n' "$*"
  "$@"
}

# answer_help ARGUMENT...: prints the comment that the script begins with, if --help is asked for.
answer_help() {
  [[ ${1:-} == --help || ${1:-} == -h ]] || return 0
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  exit 0
}

# take_a_folder EXPECTED [ARGUMENT...]: refuses all but one folder of this machine, or none.
take_a_folder() {
  if (($# > 2)) || [[ ${2:-} == -* || ${2:-} == *://* ]]; then
    echo "error: ${*:2}: expected $1" >&2
    exit 2
  fi
}

# ensure_environment EXTRA: .venv in the repository, with the project and the extra.
# Installs only where something has changed since the last time.
ensure_environment() {
  local extra=$1 python=${PYTHON:-python3} stamp
  # One that failed half-way, as where Debian has no python3-venv, lacks the latter.
  if [[ ! -x .venv/bin/python || ! -f .venv/bin/activate ]]; then
    if [[ -e .venv && ! -f .venv/pyvenv.cfg && -n $(ls -A .venv) ]]; then
      echo "error: .venv is there, but not as Python's venv makes it; move it, or activate it and" \
        "run the commands of README.md in it" >&2
      exit 2
    fi
    if ! command -v -- "$python" >/dev/null; then
      echo "error: $python: no such program; Python 3.11 or newer is needed; name one with" \
        "PYTHON=/path/to/python3" >&2
      exit 2
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "error: $python is $("$python" --version 2>&1), Python 3.11 or newer is needed;" \
        "name one with PYTHON=/path/to/python3" >&2
      exit 2
    fi
    run "$python" -m venv --clear .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
  stamp=.venv/installed-$extra
  if [[ ! -f $stamp || setup.py -nt $stamp ]]; then
    run python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
    touch "$stamp"
  fi
}
