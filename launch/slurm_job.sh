#!/usr/bin/env bash
# The job that slurm.sh submits; not by hand.
#
#   slurm_job.sh COMMAND ARGUMENT...        on every task of the job
#
# 75 from the trainers, stopped after saving, puts the job back into the queue.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  exit 0
fi
if (($# == 0)) || [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "error: expected a command, inside a Slurm job; submit it with launch/slurm.sh" >&2
  exit 2
fi

# A preemption reaches this shell too: it must live to see how the tasks end.
trap : TERM
code=0
# The first task to end must not take those along that still save; after five minutes it does, so
# that a crash does not hold the nodes until the time is over.
srun --kill-on-bad-exit=0 --wait=300 "$@" || code=$?

if ((code == 75)); then
  echo "stopped after saving: back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || {
    # Slurm has done so itself where the job was preempted by requeueing.
    echo "error: job $SLURM_JOB_ID could not be put back into the queue; submit it again to go on" >&2
    exit 75
  }
  exit 0
fi
exit "$code"
