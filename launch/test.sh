#!/usr/bin/env bash
# Runs the tests. Makes .venv if there is none and installs the test extra.
# Arguments go to pytest: ./launch/test.sh tests/diffusion -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
answer_help "$@"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ensure_environment test
run ruff check .
run ruff format --check .
# Whole files: what one test compiled, and the fixtures of a file, serve those after it.
run python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
