#!/usr/bin/env bash
# Scores a run's checkpoints on a machine of its own, beside the pod that trains. It reads the same
# bucket or share; the trainer waits for nobody. See docs/launch.md.
#
#   ./launch/evaluate_vm.sh COMMAND --kind=tpu|gpu --name=NAME --zone=ZONE [flags] [-- ARGUMENT...]
#
#   create     asks for the machine: a TPU VM of one host through queued resources, which needs
#              --accelerator_type and --runtime_version; or a GPU VM of Compute Engine, which needs
#              --machine_type, --image_family and --image_project
#   wait       until the TPU VM is there (a GPU VM is there when `create` ends)
#   copy       the repository at --commit
#   setup      environment and package, and the share if there is one
#   run        starts `evaluate --follow ARGUMENT...`, e.g. -- --workdir=gs://BUCKET/RUN/sr256
#   up         create, wait, copy, setup, run
#   status, logs, stop
#   delete     the machine. When training has ended, evaluation ends by itself; the machine does not.
#
# Flags; every command takes all:
#   --project=PROJECT --network=NAME --subnetwork=NAME --internal_ips --spot
#   --accelerator_type=v5litepod-4 --runtime_version=v2-alpha-tpuv5-lite     --kind=tpu
#   --machine_type=a2-highgpu-1g --image_family=FAMILY --image_project=PROJECT     --kind=gpu
#   --boot_disk_gb=200                               --kind=gpu
#   --bucket=gs://BUCKET/FOLDER                      the pod's; or, as there,
#   --share=SERVER:/EXPORT --mount=/mnt/share
#   --python=PYTHON --commit=HEAD
#   --wait_timeout_secs=86400 --stop_timeout_secs=600 --poll_secs=30
#   --dry_run                                        prints the commands, runs none
#
# Exit codes: 0 done, 2 bad input, 1 something outside failed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

options=([kind]=tpu [name]="" [zone]="" [project]="" [accelerator_type]="" [runtime_version]=""
  [machine_type]="" [image_family]="" [image_project]="" [boot_disk_gb]=200 [spot]="" [network]=""
  [subnetwork]="" [internal_ips]="" [bucket]="" [share]="" [mount]=/mnt/share [python]="" [commit]=HEAD
  [wait_timeout_secs]=86400 [stop_timeout_secs]=600 [poll_secs]=30 [dry_run]="")
switches=([spot]=1 [internal_ips]=1 [dry_run]=1)

is_tpu() { [[ ${options[kind]} == tpu ]]; }

check_create() {
  if is_tpu; then
    check_accelerator
    return
  fi
  need machine_type "a machine type with a GPU, such as a2-highgpu-1g"
  need image_family "an image family with the GPU's driver"
  need image_project "the project of --image_family, such as deeplearning-platform-release"
  for flag in machine_type image_family image_project network subnetwork; do
    check "$flag" "$id_form" "$id_words"
  done
  check boot_disk_gb "$whole_form" "$whole_words"
}

create() {
  if is_tpu; then
    request_tpu
    return
  fi
  where
  local more=()
  # A spot machine that is taken away must be gone, not stopped: its disk would go on to cost.
  [[ -z ${options[spot]} ]] ||
    more+=(--provisioning-model=SPOT --instance-termination-action=DELETE)
  [[ -z ${options[network]} ]] || more+=(--network="${options[network]}")
  [[ -z ${options[subnetwork]} ]] || more+=(--subnet="${options[subnetwork]}")
  [[ -z ${options[internal_ips]} ]] || more+=(--no-address)
  # Else the service account may only read, whatever its roles are.
  [[ -z ${options[bucket]} ]] || more+=(--scopes=cloud-platform)
  # Machines with a GPU cannot move to another host while that is maintained.
  execute gcloud compute instances create "${options[name]}" "${place[@]}" \
    --machine-type="${options[machine_type]}" --image-family="${options[image_family]}" \
    --image-project="${options[image_project]}" --boot-disk-size="${options[boot_disk_gb]}GB" \
    --maintenance-policy=TERMINATE "${more[@]}"
}

wait_until_there() {
  if is_tpu; then
    if [[ -n ${options[dry_run]} ]]; then tpu_state; else wait_for_tpu; fi
  fi
}

set_up() { if is_tpu; then set_up_machine tpu; else set_up_machine cuda; fi; }

start_job() {
  on_host 0 start --job=evaluate --log_dir="$(log_folder)" -- \
    env "JAX_COMPILATION_CACHE_DIR=$(compilation_cache)" \
    python -m cascaded_diffusion.evaluate --follow "${rest[@]}" --distributed=none
}

delete_machine() {
  if is_tpu; then
    delete_tpu
    return
  fi
  where
  execute gcloud compute instances delete "${options[name]}" "${place[@]}"
}

action=${1:-}
case $action in
  create | wait | copy | setup | run | up | status | logs | stop | delete) shift ;;
  --help | -h)
    usage
    exit 0
    ;;
  *)
    die "$(shown "$action"): no such command; expected create, wait, copy, setup, run, up, status," \
      "logs, stop or delete"
    ;;
esac
parse_flags "$@"
check kind '^(tpu|gpu)$' "tpu or gpu"
need kind "tpu or gpu"
check_machine
check_storage
for flag in wait_timeout_secs stop_timeout_secs poll_secs; do
  need "$flag" "$secs_words"
  check "$flag" "$secs_form" "$secs_words"
done
if [[ $action == run || $action == up ]]; then
  check_workdir evaluate "${rest[@]}"
  workdir=''
  for argument in "${rest[@]}"; do
    case $argument in --workdir=?*) workdir=1 ;; esac
  done
  [[ -n $workdir ]] || die "$action: expected \`-- --workdir=FOLDER\`, the run to score"
elif ((${#rest[@]})); then
  die "$action: takes nothing after \`--\`, got $(shown "${rest[0]}")"
fi
case $action in
  setup | run | up) need_storage "the trainer's, whose run is scored" ;;
esac

need_program gcloud "install the Google Cloud CLI"
case $action in
  create)
    check_create
    create
    ;;
  wait) wait_until_there ;;
  copy)
    resolve_commit
    copy_repository
    ;;
  setup) set_up ;;
  run)
    check_bucket
    start_job
    ;;
  up)
    check_create
    resolve_commit
    check_bucket
    create
    wait_until_there
    copy_repository
    set_up
    start_job
    ;;
  status) on_host 0 status --job=evaluate ;;
  logs) on_host 0 logs --job=evaluate ;;
  stop) on_host 0 stop --job=evaluate --timeout_secs="${options[stop_timeout_secs]}" ;;
  delete) delete_machine ;;
esac
