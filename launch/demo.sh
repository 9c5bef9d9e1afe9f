#!/usr/bin/env bash
# From nothing to pictures: trains, evaluates and samples a two-stage cascade.
#
#   ./launch/demo.sh [mnist] [RUN]    digits, in minutes on two cores
#   ./launch/demo.sh cifar10 [RUN]    photos, an hour of training on two cores
#
# RUN is the folder for the runs, by default RUN or RUN_cifar10 in the repository. Needs python3 >=
# 3.11 and a package index. The photos come from TFDS, or from PHOTOS=PATH, a folder with train/ and
# test/ that hold a folder per class. Run again, it goes on where it stopped. VARIANT=:smoke runs
# the same commands on networks too small to be any good, in two minutes, by default in RUN_smoke;
# for photos, VARIANT is :gpu where JAX finds a GPU, else :cpu.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
answer_help "$@"
data=mnist
if [[ ${1:-} == mnist || ${1:-} == cifar10 ]]; then
  data=$1
  shift
fi
take_a_folder "[mnist or cifar10] [a folder on this machine]" "$@"
given=${1:-}
if [[ -n $given ]]; then
  given=$(realpath -m -- "$given") # as the caller means it, before the folder changes
fi
photos=()
if [[ $data == cifar10 && -n ${PHOTOS:-} ]]; then
  photos=(--config.data.name=folder --config.data.path="$(realpath -m -- "$PHOTOS")")
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

names=() seconds=()

# timed NAME COMMAND...: runs a command and remembers how long it took.
timed() {
  local name=$1 start=$SECONDS
  shift
  "$@"
  names+=("$name") seconds+=($((SECONDS - start)))
}

timed "install" ensure_environment demo
variant=${VARIANT:-}
runs=RUN${variant/:/_}
if [[ $data == cifar10 ]]; then
  runs=RUN_cifar10${variant/:/_}
  if [[ -z $variant ]]; then
    variant=:$(python -c 'import jax; print("gpu" if jax.default_backend() == "gpu" else "cpu")')
  fi
fi
runs=${given:-$runs}
config=configs/$data
if [[ $data == cifar10 && $variant != :smoke ]]; then
  photos+=(--config.data.prepared_dir="$runs/prepared")
  timed "prepare the photos" run python -m cascaded_diffusion.prepare \
    --config="${config}_base16.py$variant" "${photos[@]}"
fi
timed "train base16" run python -m cascaded_diffusion.main \
  --config="${config}_base16.py$variant" --workdir="$runs/base16" "${photos[@]}"
timed "train sr32" run python -m cascaded_diffusion.main \
  --config="${config}_sr32.py$variant" --workdir="$runs/sr32" "${photos[@]}"
timed "evaluate base16" run python -m cascaded_diffusion.evaluate --workdir="$runs/base16"
timed "evaluate sr32" run python -m cascaded_diffusion.evaluate --workdir="$runs/sr32" \
  --low_res_run="$runs/base16"
timed "sample the cascade" run python -m cascaded_diffusion.sample \
  --config="${config}_cascade32.py$variant" --workdir="$runs"
timed "final numbers" run python -m cascaded_diffusion.evaluate final --workdir="$runs" \
  --config="${config}_cascade32.py$variant"
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
