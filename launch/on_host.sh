#!/usr/bin/env bash
# Runs on the machines of a cluster, started by the scripts beside it over ssh; not by hand.
#
#   on_host.sh setup  [--extra=tpu,gcs] [--share=SERVER:/EXPORT --mount=FOLDER] [--python=PYTHON]
#   on_host.sh start  --job=NAME [--id=ID] [--log_dir=FOLDER|gs://...] -- COMMAND ARGUMENT...
#   on_host.sh status --job=NAME
#   on_host.sh logs   --job=NAME
#   on_host.sh stop   --job=NAME [--timeout_secs=600] [--kill] [--for_restart]
#
# A job goes on when the ssh connection ends. Its state is below ~/cascaded_diffusion/jobs/NAME:
# process id, log and, at the end, exit code. `status` prints one line for the caller:
# `@job HOST NAME STATE ID`, STATE one of none, running, lost, stopped, exited:CODE, and ID what
# `start` was given, by which the caller knows its own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

options=([extra]=tpu [bucket]="" [share]="" [mount]="" [python]="" [job]="" [id]="" [log_dir]="" [timeout_secs]=600
  [kill]="" [for_restart]="")
switches=([kill]=1 [for_restart]=1)
root=$HOME/$machine_folder

# --- setup --------------------------------------------------------------------------------------

mount_share() {
  if mountpoint -q -- "${options[mount]}"; then
    return
  fi
  if ! command -v mount.nfs >/dev/null; then
    execute sudo apt-get -qq update
    execute sudo DEBIAN_FRONTEND=noninteractive apt-get -qq install -y nfs-common
  fi
  execute sudo mkdir -p -- "${options[mount]}"
  # hard: a server that is away for a while makes writers wait; soft would lose what they write.
  # Locks stay on (no nolock): two trainers must see each other's.
  execute sudo mount -t nfs -o hard,noatime -- "${options[share]}" "${options[mount]}"
  # A new export belongs to root; only its top folder is touched, and only where one cannot write.
  [[ -w ${options[mount]} ]] || execute sudo chmod a+rwx -- "${options[mount]}"
}

# suitable PYTHON: 3.11 or newer, able to make environments.
suitable() {
  command -v -- "$1" >/dev/null &&
    "$1" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_venv() {
  local python
  if suitable "$root/venv/bin/python"; then
    return
  fi
  if [[ -n ${options[python]} ]]; then
    suitable "${options[python]}" ||
      die "--python=$(shown "${options[python]}"): expected a Python 3.11 or newer with ensurepip" \
        "on $(hostname)"
    execute "${options[python]}" -m venv "$root/venv"
    return
  fi
  for python in python3.13 python3.12 python3.11 python3; do
    if suitable "$python"; then
      execute "$python" -m venv "$root/venv"
      return
    fi
  done
  # TPU VM images of Ubuntu 22.04 have Python 3.10: uv brings a newer one.
  execute python3 -m pip install --quiet --user uv
  execute python3 -m uv venv --seed --python 3.12 "$root/venv"
}

setup() {
  check_storage
  if [[ -n ${options[share]} ]]; then
    need mount "the folder to mount the share at"
    mount_share
  fi
  make_venv
  cd "$root/src"
  # TensorBoard writes nothing, but is asked for on these machines.
  local install=(-m pip install --quiet --disable-pip-version-check --editable ".[${options[extra]}]"
    "tensorboard>=2.19")
  [[ ${options[extra]} != tpu* ]] ||
    install+=(--find-links https://storage.googleapis.com/jax-releases/libtpu_releases.html)
  execute "$root/venv/bin/python" "${install[@]}"
}

# --- jobs ---------------------------------------------------------------------------------------

# To copy a log to a bucket.
copy_secs=120

# A process id says nothing after a reboot: another process may have it.
boot() { cat /proc/sys/kernel/random/boot_id; }

job_state() {
  local pid='' booted='' guard=''
  if [[ ! -e $job/pid ]]; then
    echo none
  elif [[ -e $job/exit_code ]]; then
    if [[ -e $job/stop_asked ]]; then echo stopped; else echo "exited:$(<"$job/exit_code")"; fi
  else
    read -r pid booted guard <"$job/pid" || true
    # The guard may still be copying the log.
    if [[ $booted == "$(boot)" ]] &&
      { kill -0 "$pid" 2>/dev/null || { [[ -n $guard ]] && kill -0 "$guard" 2>/dev/null; }; }; then
      echo running
    else
      echo lost
    fi
  fi
}

status() {
  local id=-
  [[ ! -e $job/id ]] || id=$(<"$job/id")
  printf '@job %s %s %s %s\n' "$(hostname)" "${options[job]}" "$(job_state)" "$id"
}

start() {
  local log=$job/log_file tries
  ((${#rest[@]})) || die "start: no command, expected one after \`--\`"
  [[ $(job_state) != running ]] ||
    die "--job=${options[job]}: already running on $(hostname); \`stop\` it first"
  mkdir -p "$job"
  rm -f "$job"/{pid,exit_code,stop_asked,log}
  if [[ -n ${options[log_dir]} && ${options[log_dir]} != gs://* ]]; then
    mkdir -p -- "${options[log_dir]}" ||
      die "--log_dir=$(shown "${options[log_dir]}"): cannot be made; is the share mounted? Run \`setup\`"
    log=${options[log_dir]}/${options[job]}-$(hostname).log
  fi
  ln -s -- "$log" "$job/log"
  printf '%s\n' "${options[id]:--}" >"$job/id"
  # A session of its own: the end of the ssh connection is none of its business.
  setsid bash "${BASH_SOURCE[0]}" guard --job="${options[job]}" \
    --log_dir="${options[log_dir]}" -- "${rest[@]}" \
    </dev/null >>"$log" 2>&1 &
  for ((tries = 0; tries < 100; tries++)); do
    if [[ -e $job/pid ]]; then
      status
      return
    fi
    sleep 0.1
  done
  fail "job ${options[job]} did not start on $(hostname); see $log"
}

# guard: runs the job's command and writes down its exit code. Only `start` calls it.
guard() {
  local pid code=0
  cd "$root/src"
  PATH=$root/venv/bin:$PATH
  printf '\n%s %s\n' "$(date -u +%FT%TZ)" "$(printable "${rest[@]}")"
  # At a shutdown everyone is sent SIGTERM: the trainer saves, and its code is still written. (A
  # handler, not SIG_IGN, which the trainer would inherit.)
  local signalled
  trap signalled=1 TERM HUP
  "${rest[@]}" &
  pid=$!
  echo "$pid $(boot) $$" >"$job/pid.part"
  mv "$job/pid.part" "$job/pid"
  # wait also ends when a signal arrives here; then its code is the signal's, not the trainer's.
  while true; do
    signalled=''
    wait "$pid" && code=0 || code=$?
    [[ -n $signalled ]] || break
  done
  # An object cannot be written bit by bit, so a bucket has the log once the job has ended.
  [[ ${options[log_dir]} != gs://* ]] ||
    timeout "$copy_secs" gcloud storage cp --quiet -- "$(readlink -f -- "$job/log")" \
      "${options[log_dir]}/${options[job]}-$(hostname).log" || true
  echo "$code" >"$job/exit_code.part"
  mv "$job/exit_code.part" "$job/exit_code"
}

# logs: until interrupted; goes on with the file of a job that is started anew.
logs() {
  [[ -e $job/pid ]] || die "--job=${options[job]}: no such job on $(hostname); \`run\` it first"
  exec tail -n 100 -F -- "$(readlink -f -- "$job/log")"
}

stop() {
  local pid end=$((SECONDS + ${options[timeout_secs]%.*}))
  if [[ $(job_state) == running ]]; then
    [[ -n ${options[for_restart]} ]] || touch "$job/stop_asked"
    read -r pid _ <"$job/pid"
    # The trainer alone: its reading processes are its own to end, after the last batch.
    kill -TERM "$pid" 2>/dev/null || true
    while [[ $(job_state) == running ]] && ((SECONDS < end)); do sleep 0.2; done
    if [[ -n ${options[kill]} && $(job_state) == running ]]; then
      kill -KILL "$pid" 2>/dev/null || true
      while [[ $(job_state) == running ]]; do sleep 0.2; done
    fi
  fi
  status
  [[ $(job_state) != running ]] ||
    fail "job ${options[job]} still runs on $(hostname) after ${options[timeout_secs]} s; it may be" \
      "saving: ask for its status, or stop it again with --kill"
}

case ${1:-} in
  setup | start | status | logs | stop | guard)
    action=$1
    shift
    parse_flags "$@"
    if [[ $action != setup ]]; then
      need job "the job's name"
      check job "$name_form" "$name_words"
      check id '^[0-9a-f]+$' "hexadecimal digits"
      check timeout_secs "$secs_form" "$secs_words"
      job=$root/jobs/${options[job]}
    fi
    "$action"
    ;;
  --help | -h) usage ;;
  *) die "$(shown "${1:-}"): no such command; expected setup, start, status, logs or stop" ;;
esac
