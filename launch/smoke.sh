#!/usr/bin/env bash
# Runs the :smoke variant of the paper's configs through the real commands: each stage is
# trained, checkpointed and evaluated, each cascade is sampled. No result is any good; every
# part works. (The MNIST and CIFAR-10 configs' are in the tests, the former in VARIANT=:smoke
# ./launch/demo.sh too.)
#
#   ./launch/smoke.sh [RUNS]    RUNS is the folder for the runs, by default RUN_all_smoke; made
#                               anew. JOBS=2 commands run at once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
answer_help "$@"
take_a_folder "at most a folder on this machine" "$@"
runs=$(realpath -m -- "${1:-RUN_all_smoke}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ensure_environment demo

if [[ -e $runs ]]; then
  [[ -e $runs/.smoke || -z $(ls -A "$runs") ]] ||
    { echo "error: $runs is not a folder of an earlier smoke run; name another" >&2; exit 2; }
  rm -rf "$runs"
fi
mkdir -p "$runs"
touch "$runs/.smoke"
export runs

# A stage's config file ends with `in_variant`, a cascade's with `paper_cascade` or `adm_cascade`.
mapfile -t files < <(printf '%s\n' configs/*.py | grep -v -e mnist_ -e cifar10_)
mapfile -t cascades < <(grep -l -e 'return paper_cascade(' -e 'return adm_cascade(' "${files[@]}")
mapfile -t stages < <(grep -l 'return in_variant(' "${files[@]}")

# Nearly all of the time is compilation: a quicker one of slower programs.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_llvm_disable_expensive_passes=true\
 --xla_backend_optimization_level=1"

# logged NAME COMMAND...: one line when it is done; its output only if it failed.
logged() {
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$runs/$name.log" 2>&1; then
    printf '%-28s %4d s\n' "$name" $((SECONDS - start))
  else
    printf '%-28s failed:\n' "$name" >&2
    tail -n 20 "$runs/$name.log" >&2
    return 1
  fi
}

train_and_evaluate() {
  local file=$1 name
  # The run's folder has the stage's name, which is the file's.
  name=$(basename "$file" .py)
  python -m cascaded_diffusion.main --config="$file:smoke" --workdir="$runs/$name" \
    --config.train.train_steps=8 --config.checkpoint.save_every_steps=8 &&
    python -m cascaded_diffusion.evaluate --workdir="$runs/$name"
}

sample() {
  local file=$1 name
  name=$(basename "$file" .py)
  python -m cascaded_diffusion.sample --config="$file:smoke" --workdir="$runs" \
    --output="$runs/$name"
}

stage() { logged "$(basename "$1" .py)" train_and_evaluate "$1"; }
cascade() { logged "sample_$(basename "$1" .py)" sample "$1"; }
export -f logged train_and_evaluate sample stage cascade

# shellcheck disable=SC2016
in_parallel() { printf '%s\n' "${@:2}" | xargs -P "${JOBS:-2}" -I {} bash -c "$1 {}"; }
in_parallel stage "${stages[@]}"
in_parallel cascade "${cascades[@]}"
printf '%d stages trained and evaluated, %d cascades sampled: %d s\n' \
  "${#stages[@]}" "${#cascades[@]}" "$SECONDS"
