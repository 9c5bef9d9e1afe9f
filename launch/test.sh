#!/usr/bin/env bash
# Runs the tests. Makes .venv if there is none and installs the test extra.
# Arguments go to pytest: ./launch/test.sh tests/diffusion -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

ensure_environment test
run ruff check .
run ruff format --check .
# worksteal: the slow tests stand side by side in the files.
run python -m pytest -n 2 --dist worksteal "$@"
