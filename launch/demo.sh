#!/usr/bin/env bash
# From nothing to pictures: trains, evaluates and samples a two-stage cascade on MNIST.
#
#   ./launch/demo.sh [RUN]      RUN is the folder for the runs, by default RUN in the repository
#
# Needs python3 >= 3.11 and a package index. Run again, it goes on where it stopped.
# VARIANT=:smoke runs the same commands on networks too small to be any good, in two minutes,
# by default in RUN_smoke.
set -euo pipefail
variant=${VARIANT:-}
runs=RUN${variant/:/_}
if [[ $# -gt 0 ]]; then
  runs=$(realpath -m -- "$1") # as the caller means it, before the folder changes
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

names=() seconds=()

# timed NAME COMMAND...: runs a command and remembers how long it took.
timed() {
  local name=$1 start=$SECONDS
  shift
  "$@"
  names+=("$name") seconds+=($((SECONDS - start)))
}

timed "install" ensure_environment demo
timed "train base16" run python -m cascaded_diffusion.main \
  --config="configs/mnist_base16.py$variant" --workdir="$runs/base16"
timed "train sr32" run python -m cascaded_diffusion.main \
  --config="configs/mnist_sr32.py$variant" --workdir="$runs/sr32"
timed "evaluate base16" run python -m cascaded_diffusion.evaluate --workdir="$runs/base16"
timed "evaluate sr32" run python -m cascaded_diffusion.evaluate --workdir="$runs/sr32" \
  --low_res_run="$runs/base16"
timed "sample the cascade" run python -m cascaded_diffusion.sample \
  --config="configs/mnist_cascade32.py$variant" --workdir="$runs"
timed "final numbers" run python -m cascaded_diffusion.evaluate final --workdir="$runs" \
  --config="configs/mnist_cascade32.py$variant"
timed "CAS" run python -m cascaded_diffusion.evaluate cas --workdir="$runs/sr32" \
  --samples="$runs/samples/samples.npz"
timed "report" run python -m cascaded_diffusion.report --workdir="$runs"

printf '\n%-20s %8s\n' "part" "seconds"
for i in "${!names[@]}"; do
  printf '%-20s %8d\n' "${names[i]}" "${seconds[i]}"
done
printf '%-20s %8d\n' "all" "$SECONDS"
printf '\nLook at %s/report.html and %s/samples/samples.png\n' "$runs" "$runs"
printf 'Curves: .venv/bin/pip install tensorboard && .venv/bin/tensorboard --logdir=%s\n' "$runs"
