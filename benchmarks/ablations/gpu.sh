#!/usr/bin/env bash
# The tables "augmentation" and "samplers" on a GPU, three seeds, within minutes:
#
#   ./benchmarks/ablations/gpu.sh PREPARED [MINUTES] [RESULTS]
#
# PREPARED is what `python -m cascaded_diffusion.prepare --config=configs/cifar10_base16.py
# --config.data.prepared_dir=PREPARED` made. Rows are stored in RESULTS as they are finished, by
# default in benchmarks/results/ablations; run again, it goes on. Uses the Python that is active,
# which needs jax for CUDA, flax, optax, orbax-checkpoint, array_record, grain, ml_collections,
# absl-py, clu, tqdm, Pillow and matplotlib.
set -euo pipefail
if [[ $# -lt 1 || $# -gt 3 ]]; then
  echo "error: expected PREPARED [MINUTES] [RESULTS], found $# arguments" >&2
  exit 2
fi
prepared=$(realpath -m -- "$1") minutes=${2:-11} results=${3:+$(realpath -m -- "$3")}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
results=${results:-benchmarks/results/ablations}
start=$SECONDS
for table in augmentation samplers; do
  left=$(python -c "print(max(0.01, $minutes - ($SECONDS - $start) / 60))")
  python benchmarks/ablations/run.py --table="$table" --budget="${BUDGET:-gpu}" --seeds=3 \
    --prepared_dir="$prepared" --results="$results" --minutes="$left" ||
    [[ $? -eq 75 ]] # out of time: what is finished is stored
done
