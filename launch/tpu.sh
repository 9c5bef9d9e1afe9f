#!/usr/bin/env bash
# Trains on a Cloud TPU VM or a pod of them, through queued resources. See docs/launch.md.
#
#   ./launch/tpu.sh COMMAND --name=NAME --zone=ZONE [--project=PROJECT] [flags] [-- main ARGUMENT...]
#
#   create     asks for the slice; needs --accelerator_type, --runtime_version
#   wait       until it is there, at most --wait_timeout_secs
#   copy       the repository at --commit to all workers
#   setup      environment and package on all workers, and the share if there is one
#   run        starts `main ARGUMENT...` (or evaluate, sample; with --worker=0 also prepare, ...)
#              on all workers; it goes on when this machine is switched off
#   status     the state of the request, and of the job on each worker
#   logs       follows the job's output on --worker, 0 by default
#   stop       has the trainers save and end
#   train      all of it: create, wait, copy, setup, run; starts over when the slice is preempted,
#              runs again what was stopped after saving; deletes the slice at the end. Run again,
#              it goes on with the slice that is there. (supervise is another name for it.)
#   delete     the slice and the request
#
# Flags; every command takes all, so that they can be kept in one array:
#   --accelerator_type=v5litepod-256  --runtime_version=v2-alpha-tpuv5-lite  --spot
#   --network=NAME --subnetwork=NAME --internal_ips      where not the project's default
#   --bucket=gs://BUCKET/FOLDER                          where runs are; not public, see the docs
#   --share=SERVER:/EXPORT --mount=/mnt/share            or the NFS share that all workers mount
#   --python=PYTHON        on the workers; default: the newest there, else uv brings 3.12
#   --commit=HEAD          what `copy` copies
#   --worker=all           a number, for logs and run
#   --job=main             which job's status, logs, stop: what was given to run
#   --wait_timeout_secs=86400 --stop_timeout_secs=600 --poll_secs=30
#   --max_failures=3       of train: crashes in a row, none of them a preemption
#   --max_slices=100       of train: slices used up, one after the other
#   --max_unanswered=20    of train: looks in a row at workers that do not answer; then the slice is
#                          taken for lost
#   --keep                 of train: do not delete the slice at the end. It goes on to cost money.
#   --dry_run              prints the commands, runs none
#
# Exit codes: 0 done, 2 bad input (train: also the trainer's), 1 something outside failed,
# 75 train: stopped by `stop`, run again to go on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

options=([kind]=tpu [name]="" [zone]="" [project]="" [accelerator_type]="" [runtime_version]=""
  [spot]="" [network]="" [subnetwork]="" [internal_ips]="" [bucket]="" [share]="" [mount]=/mnt/share
  [python]="" [commit]=HEAD [worker]="" [job]=main [wait_timeout_secs]=86400
  [stop_timeout_secs]=600 [poll_secs]=30 [max_failures]=3
  [max_slices]=100 [max_unanswered]=20 [keep]="" [dry_run]="")
switches=([spot]=1 [internal_ips]=1 [keep]=1 [dry_run]=1)

# A job that ran this long was healthy: what ends it then is not the same failure once more.
healthy_secs=1800
# So often in a row a worker may crash while the others end by 75.
max_crashes=10
# Where some workers have ended and others go on, JAX ends those after its heartbeat is missed. If
# they still run after this, they are ended from here.
stuck_secs=600

# job_command: puts into `job` what the workers run for `rest`, e.g. main --config=...
job_command() {
  local module=${rest[0]:-} worker=${options[worker]:-all}
  case $module in
    main | evaluate | sample) ;;
    prepare | plan | reference | report)
      [[ $worker != all ]] ||
        die "run -- $module: for one machine; add --worker=0"
      ;;
    *)
      die "run -- $(shown "$module"): expected main, evaluate, sample, prepare, plan, reference or" \
        "report, and its arguments"
      ;;
  esac
  check_workdir "$module" "${rest[@]:1}"
  options[job]=$module
  job=(python -m "cascaded_diffusion.$module" "${rest[@]:1}")
  if [[ $module =~ ^(main|evaluate|sample)$ ]] && ! finds_peers "${rest[@]:1}"; then
    # Said outright: if the workers did not find each other, each would train a model of its own.
    if [[ $worker == all ]]; then job+=(--distributed=tpu); else job+=(--distributed=none); fi
  fi
  # For a new slice to find what the last one compiled.
  [[ -z $(storage_folder) ]] || job=(env "JAX_COMPILATION_CACHE_DIR=$(compilation_cache)" "${job[@]}")
  job_id=$(quoted "${job[@]}" | hash_of | cut -c -16)
}

start_job() {
  local start=(start --job="${options[job]}" --id="$job_id") folder
  folder=$(log_folder)
  [[ -z $folder ]] || start+=(--log_dir="$folder")
  on_host "${options[worker]:-all}" "${start[@]}" -- "${job[@]}"
}

# worker_states: sets `states` to the workers' states of the job; fails where none answers.
worker_states() {
  local command output state id
  # A new machine has no copy yet: that is `none`.
  # shellcheck disable=SC2016
  ssh_command all sh -c \
    'if [ -e "$1" ]; then exec bash "$@"; else echo "@job $(hostname) - none -"; fi' \
    status "$machine_folder/src/launch/on_host.sh" status --job="${options[job]}"
  output=$("${command[@]}" </dev/null 2>/dev/null) || return 1
  states=()
  while read -r state id; do
    [[ $state != running || $id == "$job_id" ]] || state=other
    states+=("$state")
  done < <(sed -n 's/^.*@job [^ ]* [^ ]* \([a-z:0-9]* [-0-9a-f]*\).*$/\1/p' <<<"$output")
  ((${#states[@]}))
}

# among STATE...: whether one of `states` is among them.
among() {
  local wanted have
  for have in "${states[@]}"; do
    for wanted in "$@"; do
      [[ $have != "$wanted" ]] || return 0
    done
  done
  return 1
}

# only STATE: whether all of `states` are this.
only() {
  local have
  for have in "${states[@]}"; do
    [[ $have == "$1" ]] || return 1
  done
}

stop_job() {
  on_host "${options[worker]:-all}" stop --job="${options[job]}" \
    --timeout_secs="${options[stop_timeout_secs]}" "$@"
}

deploy() {
  copy_repository && set_up_machine tpu
}

# node_lost: whether the TPU VM itself says that it is gone, whatever its request says.
node_lost() {
  local node
  where
  node=$(gcloud compute tpus tpu-vm describe "${options[name]}" "${place[@]}" \
    "--format=value(state)" 2>/dev/null) || return 1
  [[ $node == PREEMPTED || $node == TERMINATED ]]
}

# --- train --------------------------------------------------------------------------------------

# finish CODE MESSAGE: the end of `train`, whatever it is: says so, and leaves nothing that costs.
finish() {
  local code=$1
  shift
  trap - INT TERM
  if [[ -n ${options[keep]} ]]; then
    say "note: --keep: ${options[name]} is still there and costs money until you \`delete\` it"
  elif ! delete_tpu; then
    say "note: ${options[name]} could not be deleted and may go on to cost money; see" \
      "\`gcloud compute tpus queued-resources list --zone=${options[zone]}\`"
    ((code)) || code=1
  fi
  if ((code)); then
    printf 'error: %s\n' "$*" >&2
  else
    printf '%s\n' "$*"
  fi
  exit "$code"
}

# give_up_later WHAT: counts a failure that may pass; ends `train` after too many in a row.
give_up_later() {
  ((++failures <= options[max_failures])) ||
    finish 1 "${options[name]}: $1, more than --max_failures=${options[max_failures]} times in a" \
      "row; see the logs$(log_hint)"
  say "${options[name]}: $1 ($failures of at most ${options[max_failures]} in a row)"
}

log_hint() {
  local folder
  folder=$(log_folder)
  [[ -z $folder ]] || printf ' in %s' "$(shown "$folder")"
}

start_over() {
  ((++slices < options[max_slices])) ||
    finish 1 "${options[name]}: --max_slices=${options[max_slices]} slices are used up"
  say "${options[name]}: $1; deleting it, asking for another"
  delete_tpu || give_up_later "the slice could not be deleted"
  requested=$SECONDS
  started='' stuck_since='' unreachable=0 failures=0 crashes=0 answers=0
}

# One look at the workers of an ACTIVE slice, and what is to be done about it.
tend_workers() {
  local states=()
  if ! worker_states; then
    if node_lost || ((++unreachable > options[max_unanswered])); then
      start_over "the workers are gone"
    fi
    return 0
  fi
  if ((${#states[@]} < answers)); then
    # That those who answer have finished says nothing of the others.
    if node_lost || ((++unreachable > options[max_unanswered])); then
      start_over "${#states[@]} of $answers workers answer"
    fi
    return 0
  fi
  answers=${#states[@]}
  unreachable=0
  ! among other ||
    fail "${options[name]}: something else is running there; \`stop\` it first, or wait for its end"
  if [[ -n $first_look ]] && ! among running; then
    # How an earlier job ended, perhaps another, is not how this one did.
    states=(none)
  fi
  first_look=''
  if among running && ! only running; then
    [[ -n $stuck_since ]] || stuck_since=$SECONDS
    if ((SECONDS - stuck_since >= stuck_secs)); then
      say "${options[name]}: some workers have ended, others have not; ending those"
      stop_job --for_restart --kill || true
      stuck_since=''
    fi
  elif among running; then
    stuck_since=''
    if [[ -z $started ]]; then
      say "${options[name]}: running"
      started=$SECONDS
    fi
    ((SECONDS - started < healthy_secs)) || failures=0 crashes=0
  elif only exited:2; then
    # (Of some workers only, 2 can also mean that they waited in vain for one that crashed.)
    finish 2 "the trainer refused its input, exit code 2; its last lines are in the log$(log_hint)"
  elif among stopped; then
    finish 75 "stopped as asked; the same command goes on"
  elif only exited:0; then
    finish 0 "${options[name]}: finished"
  elif among none lost; then
    if among lost; then give_up_later "a worker was started anew"; fi
    if deploy && start_job; then
      started=''
    else
      give_up_later "copy, setup or start failed"
    fi
  else
    if among exited:75; then
      # Where one has crashed, the others stop, too, by 75. That may happen, but not every time.
      if only exited:75; then
        crashes=0
      elif ((++crashes > max_crashes)); then
        finish 1 "${options[name]}: ended with ${states[*]}, and $max_crashes times before in a" \
          "row; see the logs$(log_hint)"
      fi
      say "${options[name]}: stopped by a signal after saving; running it again"
    else
      give_up_later "ended with ${states[*]}"
    fi
    start_job || give_up_later "start failed"
    started=''
  fi
}

train() {
  local state requested=$SECONDS slices=0 failures=0 unreachable=0 started='' stuck_since=''
  local unanswered=0 last='' first_look=1 answers=0 gone=0 crashes=0
  if [[ -n ${options[dry_run]} ]]; then
    request_tpu
    tpu_state
    deploy
    start_job
    [[ -n ${options[keep]} ]] || delete_tpu
    return
  fi
  trap 'say "note: ${options[name]} goes on without this supervisor, and costs money: run the same" \
    "command again, or \`delete\` it"; exit 130' INT TERM
  while true; do
    if ! tpu_state; then
      ((++unanswered <= options[max_unanswered])) ||
        fail "${options[name]}: its state could not be asked for, more than" \
          "--max_unanswered=${options[max_unanswered]} times in a row; it may be running and cost" \
          "money: look, then run the same command again"
      sleep "${options[poll_secs]}"
      continue
    fi
    unanswered=0
    [[ $state == "$last" ]] || say "${options[name]}: $state"
    last=$state
    [[ $state == GONE ]] || gone=0
    case $state in
      GONE)
        # One answer is not enough to give up a slice whose workers have answered.
        if ((answers && ++gone < 3)); then
          sleep "${options[poll_secs]}"
          continue
        fi
        answers=0
        request_tpu || give_up_later "the slice could not be asked for"
        ;;
      ACTIVE)
        requested=$SECONDS
        tend_workers
        ;;
      SUSPENDED) start_over "preempted" ;;
      FAILED)
        finish 1 "${options[name]}: the request has FAILED; quota, zone, --accelerator_type and" \
          "--runtime_version must fit: see \`gcloud compute tpus queued-resources describe\`"
        ;;
      *)
        ((SECONDS - requested < ${options[wait_timeout_secs]%.*})) ||
          finish 1 "${options[name]}: still $state after" \
            "--wait_timeout_secs=${options[wait_timeout_secs]}"
        ;;
    esac
    sleep "${options[poll_secs]}"
  done
}

# --- the command line ---------------------------------------------------------------------------

command_name=${1:-}
case $command_name in
  create | wait | copy | setup | run | status | logs | stop | train | supervise | delete) shift ;;
  --help | -h)
    usage
    exit 0
    ;;
  *)
    die "$(shown "$command_name"): no such command; expected create, wait, copy, setup, run," \
      "status, logs, stop, train or delete"
    ;;
esac
parse_flags "$@"
check_machine
check_storage
check worker '^(all|[0-9]{1,4})$' "a worker's number, or all"
check job "$name_form" "$name_words"
for flag in wait_timeout_secs stop_timeout_secs poll_secs; do
  need "$flag" "$secs_words"
  check "$flag" "$secs_form" "$secs_words"
done
for flag in max_failures max_slices max_unanswered; do need "$flag" "$count_words"; done
check max_failures "$count_form" "$count_words"
check max_slices "$whole_form" "$whole_words"
check max_unanswered "$count_form" "$count_words"
need job "a job's name"
need_program gcloud "install the Google Cloud CLI"
if [[ $command_name =~ ^(run|train|supervise)$ ]]; then
  job_command
elif ((${#rest[@]})); then
  die "$command_name: takes nothing after \`--\`, got $(shown "${rest[0]}")"
fi

case $command_name in
  create)
    check_accelerator
    check_bucket
    request_tpu
    ;;
  wait) wait_for_tpu ;;
  copy)
    resolve_commit
    copy_repository
    ;;
  setup) set_up_machine tpu ;;
  run)
    check_bucket
    start_job
    ;;
  status)
    tpu_state
    printf '%s %s\n' "${options[name]}" "$state"
    [[ $state != ACTIVE ]] || on_host all status --job="${options[job]}"
    ;;
  logs)
    [[ ${options[worker]} != all ]] || die "--worker=all: expected one worker's number for logs"
    on_host "${options[worker]:-0}" logs --job="${options[job]}"
    ;;
  stop) stop_job ;;
  train | supervise)
    check_accelerator
    need_storage "what is on the workers ends with a preemption"
    [[ ${rest[0]} =~ ^(main|evaluate|sample)$ ]] ||
      die "train -- ${rest[0]}: expected main, evaluate or sample, which go on where they stopped"
    [[ ${options[worker]:-all} == all ]] || die "--worker=${options[worker]}: train uses all workers"
    resolve_commit
    check_bucket
    train
    ;;
  delete) delete_tpu ;;
esac
