#!/usr/bin/env bash
# TensorBoard over a run's event files, for this machine's browser alone: it listens on the loopback
# of the machine that has the files, and an ssh tunnel brings it here. See docs/launch.md.
#
#   ./launch/tensorboard.sh --logdir=RUN                                       files on this machine
#   ./launch/tensorboard.sh --kind=ssh --host=USER@HOST --logdir=FOLDER        any host
#   ./launch/tensorboard.sh --kind=tpu --name=NAME --zone=ZONE --logdir=FOLDER       a TPU VM
#   ./launch/tensorboard.sh --kind=gpu --name=NAME --zone=ZONE --logdir=FOLDER       a GPU VM
#
#   --port=6006            here and there
#   --python=PYTHON        kind local: the Python that has TensorBoard; default .venv, else python3
#   --project=PROJECT --internal_ips
#   --dry_run              prints the commands, runs none
#
# The other machine must have been set up by tpu.sh or evaluate_vm.sh; a host of your own needs
# this repository at ~/cascaded_diffusion/src and an environment with TensorBoard at
# ~/cascaded_diffusion/venv. Ctrl-C ends the tunnel and TensorBoard. Exit codes: 0 done, 2 bad input,
# others are ssh's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

options=([kind]=local [name]="" [zone]="" [project]="" [host]="" [internal_ips]="" [logdir]=""
  [port]=6006 [python]="" [dry_run]="")
switches=([internal_ips]=1 [dry_run]=1)

parse_flags "$@"
((${#rest[@]} == 0)) || die "takes nothing after \`--\`, got $(shown "${rest[0]}")"
need logdir "a folder with event files, such as RUN or gs://BUCKET/RUN"
need kind "local, ssh, tpu or gpu"
check kind '^(local|ssh|tpu|gpu)$' "local, ssh, tpu or gpu"
need port "a port from 1024"
check port '^[0-9]{4,5}$' "a port from 1024"
((10#${options[port]} >= 1024 && 10#${options[port]} <= 65535)) ||
  die "--port=${options[port]}: expected a port from 1024 to 65535"

# Never another address: TensorBoard asks nobody who they are.
board=(-m tensorboard.main --logdir="${options[logdir]}" --host=127.0.0.1 --port="${options[port]}")

if [[ ${options[kind]} == local ]]; then
  python=${options[python]}
  if [[ -z $python ]]; then
    python=python3
    [[ ! -x $repository/.venv/bin/python ]] || python=$repository/.venv/bin/python
  fi
  execute "$python" "${board[@]}"
  exit
fi

check_machine
[[ ${options[logdir]} == /* || ${options[logdir]} == gs://* ]] ||
  die "--logdir=$(shown "${options[logdir]}"): expected an absolute folder of the other machine, or" \
    "gs://BUCKET/FOLDER"
end() { on_host 0 stop --job=tensorboard --timeout_secs=10 --kill || true; }
# What an earlier tunnel left may read another folder.
end
on_host 0 start --job=tensorboard -- python "${board[@]}"
[[ -n ${options[dry_run]} ]] || trap end EXIT
say "http://127.0.0.1:${options[port]}"
tunnel "${options[port]}"
