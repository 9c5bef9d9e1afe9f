#!/usr/bin/env bash
# Shows in about four minutes that training, resuming and the demo work on the GPU that is here.
#
#   ./benchmarks/gpu_check.sh [FOLDER]      FOLDER is for the runs, by default RUN_gpu_check
#
# 1. Six steps in float32 on the CPU and on the GPU: losses equal to 1e-4, gradient norms to 1e-3.
# 2. The CPU's checkpoint, resumed on the GPU to step 12, against the same on the CPU.
# 3. The same in bfloat16 on the GPU: finite, and within 5 % of float32.
# 4. The demo at full size, with the commands of launch/demo.sh and no flag changed.
# What was found is printed and stored in FOLDER/result.txt as soon as it is known.
#
# Uses .venv; where there is none, Python's own packages (PYTHON names another interpreter). They
# must include JAX for CUDA: `.venv/bin/pip install "jax[cuda13]"` after ./launch/demo.sh.
set -euo pipefail
folder=$(realpath -m -- "${1:-RUN_gpu_check}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -x .venv/bin/python ]]; then
  "${PYTHON:-python3}" -m venv --system-site-packages .venv
  touch .venv/installed-demo # nothing is installed: the machine may have no package index
fi
# shellcheck disable=SC1091
source .venv/bin/activate
mkdir -p "$folder"
exec > >(tee -a "$folder/result.txt") 2>&1

if ! python -c 'import sys, jax; sys.exit(jax.default_backend() != "gpu")'; then
  echo "error: JAX finds no GPU here" >&2
  exit 2
fi
config=(--config=configs/mnist_base16.py:smoke --config.train.log_every_steps=1
  --config.train.sample_every_steps=None --config.train.lr_decay=none)

# train RUN STEPS [FLAG...]: trains or resumes a small run to a step.
train() {
  local run=$1 steps=$2
  shift 2
  python -m cascaded_diffusion.main "${config[@]}" --workdir="$folder/$run" \
    --config.train.train_steps="$steps" "$@" >"$folder/$run.log" 2>&1
}

# compare NAME RUN RUN LOSS NORM: prints how far two runs are apart; fails beyond the tolerances.
compare() {
  printf '%s (%d s): ' "$1" "$SECONDS"
  python benchmarks/compare_runs.py "$folder/$2" "$folder/$3" --loss="$4" --grad_norm="$5"
}

# TF32 and bfloat16 passes would hide what is compared.
export JAX_DEFAULT_MATMUL_PRECISION=highest
JAX_PLATFORMS=cpu train cpu 6
cp -r "$folder/cpu" "$folder/resumed"
train gpu 6
compare "6 steps, float32" cpu gpu 1e-4 1e-3
JAX_PLATFORMS=cpu train cpu 12
train resumed 12
compare "a CPU's checkpoint resumed" cpu resumed 1e-4 1e-3
unset JAX_DEFAULT_MATMUL_PRECISION
train bfloat16 12 --config.stage.network.dtype=bfloat16
compare "bfloat16" cpu bfloat16 0.05 0.2
./launch/demo.sh "$folder/demo"
printf 'all (%d s)\n' "$SECONDS"
