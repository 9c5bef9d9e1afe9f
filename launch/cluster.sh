# Sourced by the scripts beside it: flags, errors, quoting, and the ways to reach other machines.
# shellcheck shell=bash
# What is set here is used there.
# shellcheck disable=SC2034

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION, expected 4.4 or newer; start the script with a newer one" >&2
  exit 2
fi

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Where things are on a machine, below the home folder of the user who logs in.
machine_folder=cascaded_diffusion

# --- Errors, flags ------------------------------------------------------------------------------

# die MESSAGE: what is wrong, what is expected, which flag to change. One line, exit code 2.
die() {
  local message="$*"
  printf 'error: %s\n' "${message//[$'\n\r']/ }" >&2
  exit 2
}

# fail MESSAGE: something outside did not work; the input may be good. One line, exit code 1.
fail() {
  local message="$*"
  printf 'error: %s\n' "${message//[$'\n\r']/ }" >&2
  exit 1
}

say() { printf '%s\n' "$*" >&2; }

# A value as it is shown in an error: on one line, whatever is in it.
shown() { printf '%q' "$1"; }

declare -A options=() switches=()
rest=()

# usage: the comment at the head of the calling script, which is its manual.
usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

# parse_flags ARGUMENT...: --name=value into options[name], --name into options[name]=1 for
# switches; what comes after `--` into rest. The keys of both are the flags there are, with `_`;
# `-` is taken too, as gcloud writes flags so.
parse_flags() {
  local argument name
  while (($#)); do
    argument=$1
    shift
    if [[ $argument == -- ]]; then
      rest=("$@")
      return
    fi
    if [[ $argument == --help || $argument == -h ]]; then
      usage
      exit 0
    fi
    name=${argument%%=*}
    name=${name#--}
    name=${name//-/_}
    # Names go into subscripts, where bash would expand a $(...): only plain ones get there.
    if [[ $argument != --* || ! $name =~ ^[a-z][a-z_]*$ ]]; then
      die "$(shown "$argument"): expected --flag=value, and the program's own after \`--\`; see --help"
    elif [[ -n ${switches[$name]+set} ]]; then
      [[ $argument != *=* ]] || die "--$name: takes no value, got $(shown "${argument#*=}")"
      options[$name]=1
    elif [[ -n ${options[$name]+set} ]]; then
      [[ $argument == *=* ]] || die "--$name: no value, expected --$name=VALUE"
      options[$name]=${argument#*=}
    else
      die "--$name: no such flag; see --help"
    fi
  done
}

# need FLAG WHAT: the flag must have a value.
need() {
  [[ -n ${options[$1]} ]] || die "--$1: missing, expected $2; add --$1=VALUE"
}

# check FLAG REGEX WHAT: the flag's value, if there is one, must be of this form.
check() {
  local value=${options[$1]} LC_ALL=C # a-z is ASCII
  [[ -z $value || $value =~ $2 ]] || die "--$1=$(shown "$value"): expected $3"
}

name_form='^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$'
name_words='at most 63 of a-z, 0-9 and -, the first a letter, the last not a -'
id_form='^[A-Za-z0-9][-A-Za-z0-9._:/]*$'
id_words='letters, digits and -._:/, the first a letter or a digit'
whole_form='^[1-9][0-9]{0,8}$'
whole_words='a whole number from 1'
count_form='^(0|[1-9][0-9]{0,8})$'
count_words='a whole number from 0'
# No leading zeros: bash would count in eights.
secs_form='^(0|[1-9][0-9]{0,8})(\.[0-9]{1,3})?$'
secs_words='a number of seconds'

# --- Running and quoting ------------------------------------------------------------------------

# execute COMMAND...: shows the command as a reader can repeat it, and runs it. With --dry_run it
# is only printed, to stdout.
execute() {
  if [[ -n ${options[dry_run]:-} ]]; then
    printable "$@"
  else
    say "\$ $(printable "$@")"
    "$@"
  fi
}

printable() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# quoted ARGUMENT...: one string that any POSIX shell splits into just these arguments. (printf %q
# would write $'...' for some, which only bash and its kin understand.)
quoted() {
  local argument line='' escape="'\\''"
  for argument in "$@"; do
    line+=" '${argument//"'"/"$escape"}'"
  done
  printf '%s' "${line# }"
}

# --- Machines -----------------------------------------------------------------------------------
# options[kind] says how a machine is reached: tpu (a Cloud TPU VM or a pod of them), gpu (a VM of
# Compute Engine), ssh (any host).

# check_machine: the flags that name the machine.
check_machine() {
  if [[ ${options[kind]} == ssh ]]; then
    need host "a host that ssh knows, such as user@host"
    # A leading dash would be a flag of ssh's.
    check host '^[A-Za-z0-9_][-A-Za-z0-9_.@:]*$' "a host that ssh knows, such as user@host"
    return
  fi
  need name "the name of the machine"
  check name "$name_form" "$name_words"
  need zone "the zone of the machine, such as us-west4-a"
  check zone "$name_form" "a zone, such as us-west4-a"
  check project "$id_form" "a project's id: $id_words"
}

# where: the arguments that every gcloud command gets.
where() {
  place=(--zone="${options[zone]}")
  [[ -z ${options[project]} ]] || place+=(--project="${options[project]}")
  # Nobody is there to answer a question, such as the one for a new SSH key.
  place+=(--quiet)
}

# ssh_command WORKER [ARGUMENT...]: puts into `command` what runs ARGUMENT... on a machine, each of
# them arriving as it is. WORKER is a number or `all`, and matters for a TPU pod only.
ssh_command() {
  local worker=$1
  shift
  case ${options[kind]} in
    tpu)
      where
      command=(gcloud compute tpus tpu-vm ssh "${options[name]}" "${place[@]}" --worker="$worker")
      [[ -z ${options[internal_ips]:-} ]] || command+=(--internal-ip)
      ;;
    gpu)
      where
      command=(gcloud compute ssh "${options[name]}" "${place[@]}")
      [[ -z ${options[internal_ips]:-} ]] || command+=(--internal-ip)
      ;;
    ssh)
      command=(ssh "${options[host]}")
      (($# == 0)) || command+=(-- "$(quoted "$@")")
      return
      ;;
  esac
  # A machine that has gone must not hold its caller for good.
  command+=(--ssh-flag=-oConnectTimeout=60 --ssh-flag=-oServerAliveInterval=60)
  (($# == 0)) || command+=(--command="$(quoted "$@")")
}

on_machine() {
  local command
  ssh_command "$@"
  execute "${command[@]}"
}

# on_host WORKER ARGUMENT...: runs launch/on_host.sh of the copy on the machine.
on_host() {
  on_machine "$1" bash "$machine_folder/src/launch/on_host.sh" "${@:2}"
}

# tunnel PORT: forwards the port of this machine's loopback to the one of the other's, until ended.
tunnel() {
  local command
  ssh_command 0
  [[ ${options[kind]} == ssh ]] || command+=(--)
  # ssh must fail where the port is taken, not go on without it.
  local forward=(-N -o ExitOnForwardFailure=yes -L "127.0.0.1:$1:127.0.0.1:$1")
  if [[ ${options[kind]} == ssh ]]; then
    command=(ssh "${forward[@]}" "${options[host]}")
  else
    command+=("${forward[@]}")
  fi
  execute "${command[@]}"
}

# resolve_commit: options[commit] as a full hash. Done once, so that a slice that comes back after
# days runs what the first one ran, whatever has been committed since.
resolve_commit() {
  local hash
  hash=$(git -C "$repository" rev-parse --verify --quiet --end-of-options \
    "${options[commit]}^{commit}") ||
    die "--commit=$(shown "${options[commit]}"): no such commit in $repository"
  options[commit]=$hash
}

# hash_of <FILE: SHA-256.
hash_of() {
  if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -c -64
}

# On the machine: the archive is compared before anything of it is used, and the old copy goes
# when the new one is complete.
# shellcheck disable=SC2016
unpack='set -eu; cd; mkdir -p "$3"; cd "$3"; '
# shellcheck disable=SC2016
unpack+='printf "%s  %s\n" "$1" "../$2" | sha256sum --check --status || '
unpack+='{ echo "error: the archive has arrived damaged; copy again" >&2; exit 1; }; '
# shellcheck disable=SC2016
unpack+='for run in src/RUN*; do [ -e "$run" ] || continue; echo "error: ~/$3/$run holds runs, which this copy would delete;'
# shellcheck disable=SC2016
unpack+=' move it, and give runs a --workdir elsewhere" >&2; exit 1; done; '
# shellcheck disable=SC2016
unpack+='rm -rf src.new src.old; mkdir src.new; tar -xzf "../$2" -C src.new; '
# shellcheck disable=SC2016
unpack+='if [ -e src ]; then mv src src.old; fi; mv src.new src; rm -rf src.old "../$2"'

# copy_repository: the files of options[commit] to all workers.
copy_repository() {
  local commit=${options[commit]} folder archive sum name status=0
  folder=$(mktemp -d) || return
  name=$machine_folder-${commit:0:12}.tar.gz
  archive=$folder/$name
  if [[ -n $(git -C "$repository" status --porcelain 2>/dev/null) ]]; then
    say "note: what is not committed is not copied"
  fi
  # (Where the caller asks whether this succeeds, bash does not stop at errors by itself.)
  execute git -C "$repository" archive --format=tar.gz --output="$archive" "$commit" || return
  if [[ -n ${options[dry_run]:-} ]]; then
    sum=SHA256
  else
    sum=$(hash_of <"$archive") || return
    say "$name: commit $commit, SHA-256 $sum"
  fi
  { send "$archive" "$name" &&
    on_machine all sh -c "$unpack" unpack "$sum" "$name" "$machine_folder"; } || status=$?
  rm -rf "$folder"
  return "$status"
}

# send FILE NAME: to the home folder of all workers.
send() {
  where
  local internal=()
  [[ -z ${options[internal_ips]:-} ]] || internal=(--internal-ip)
  case ${options[kind]} in
    tpu)
      execute gcloud compute tpus tpu-vm scp "$1" "${options[name]}:$2" "${place[@]}" \
        --worker=all "${internal[@]}"
      ;;
    gpu)
      execute gcloud compute scp "$1" "${options[name]}:$2" "${place[@]}" "${internal[@]}"
      ;;
  esac
}

# set_up_machine EXTRA: environment, package and share on all workers.
set_up_machine() {
  local setup=(setup --extra="$1${options[bucket]:+,gcs}")
  [[ -z ${options[python]} ]] || setup+=(--python="${options[python]}")
  [[ -z ${options[share]} ]] || setup+=(--share="${options[share]}" --mount="${options[mount]}")
  on_host all "${setup[@]}"
}

# check_storage: where runs and data are: in a bucket, or on an NFS share.
check_storage() {
  check bucket '^gs://[a-z0-9][-a-z0-9._]{1,220}[a-z0-9](/[A-Za-z0-9_][-A-Za-z0-9._]*)*/?$' \
    "gs://BUCKET or gs://BUCKET/FOLDER"
  options[bucket]=${options[bucket]%/}
  [[ -z ${options[bucket]} || -z ${options[share]} ]] ||
    die "--share=$(shown "${options[share]}"): expected none with --bucket; leave one of them out"
  check share '^[A-Za-z0-9][-A-Za-z0-9.]*:/.+' "SERVER:/EXPORT of an NFS share"
  check mount '^/[^/].*' "an absolute folder, such as /mnt/share"
}

# need_storage WHY: there must be a bucket or a share.
need_storage() {
  [[ -n ${options[bucket]}${options[share]} ]] ||
    die "--bucket: missing, expected gs://BUCKET/FOLDER, or --share=SERVER:/EXPORT of an NFS share:" \
      "$1; add --bucket=VALUE"
}

# check_bucket: that the bucket is there, may be looked at, and can never be read by the public.
check_bucket() {
  local bucket errors access
  [[ -n ${options[bucket]} ]] || return 0
  bucket=${options[bucket]#gs://}
  bucket=gs://${bucket%%/*}
  local ask=(gcloud storage buckets describe "$bucket"
    "--format=value(public_access_prevention)")
  [[ -z ${options[project]:-} ]] || ask+=(--project="${options[project]}")
  if [[ -n ${options[dry_run]:-} ]]; then
    printable "${ask[@]}"
    return
  fi
  errors=$(mktemp)
  if access=$("${ask[@]}" 2>"$errors"); then
    rm -f "$errors"
    [[ $access == enforced ]] ||
      die "--bucket=${options[bucket]}: the public could be given access (public access prevention" \
        "is ${access:-unknown}); run \`gcloud storage buckets update $bucket" \
        "--public-access-prevention\`"
    return
  fi
  local answer
  answer=$(error_line "$errors")
  rm -f "$errors"
  case $answer in
    *403* | *ermission* | *denied*)
      die "--bucket=${options[bucket]}: access was denied to you; the role roles/storage.bucketViewer" \
        "on $bucket is missing: \`gcloud storage buckets add-iam-policy-binding $bucket" \
        "--member=user:YOU --role=roles/storage.bucketViewer\`"
      ;;
    *404* | *"not found"* | *"does not exist"*)
      die "--bucket=${options[bucket]}: there is no such bucket; run \`gcloud storage buckets create" \
        "$bucket --location=REGION --uniform-bucket-level-access --public-access-prevention\`"
      ;;
    *) fail "--bucket=${options[bucket]}: could not be asked about: $answer" ;;
  esac
}

# check_workdir MODULE ARGUMENT...: a run's folder that is not in the bucket or on the share would
# end with the machine, and on several hosts be several folders. So would the samples of --output.
check_workdir() {
  local module=$1 argument flag folder previous='' base='' what named=''
  shift
  if [[ -n ${options[bucket]} ]]; then
    base=${options[bucket]}
    what="expected a folder in the bucket, --bucket=$base"
  elif [[ -n ${options[share]} ]]; then
    base=${options[mount]%/}
    what="expected a folder below the share, --mount=$(shown "${options[mount]}")"
  else
    return 0
  fi
  for argument in "$@"; do
    folder='' flag=''
    case $argument in -*=*) flag=${argument%%=*} folder=${argument#*=} ;; esac
    case $previous in
      --workdir | -workdir | --output | -output | --replay | -replay) flag=$previous folder=$argument ;;
    esac
    flag=${flag#-}
    case ${flag#-} in
      workdir) named=$folder ;;
      # Another bucket does not end with the machine either.
      output) [[ $module =~ ^(main|evaluate|sample)$ && $folder != gs://* ]] || folder='' ;;
      replay | flagfile) named=1 folder='' ;;
      *) folder='' ;;
    esac
    [[ -z $folder || ($folder == "$base"/* && $folder/ != */../*) ]] ||
      die "--${flag#-}=$(shown "$folder"): $what"
    previous=$argument
  done
  [[ $module != main || -n $named ]] || die "-- main: --workdir is missing; $what"
}

# finds_peers ARGUMENT...: whether a command says itself how its processes find each other.
finds_peers() {
  local argument
  for argument in "$@"; do
    argument=${argument#-}
    case ${argument#-} in distributed | distributed=* | coordinator | coordinator=*) return 0 ;; esac
  done
  return 1
}

# error_line FILE: what gcloud says of an error: the last line that begins so, or the last one.
error_line() {
  grep -e '^ERROR:' "$1" | tail -n 1 | grep . || tail -n 1 "$1"
}

# need_program NAME WHAT: unless commands are only printed, as they may be on another machine.
need_program() {
  [[ -n ${options[dry_run]:-} ]] || command -v -- "$1" >/dev/null ||
    die "$1: no such program here; $2"
}

# storage_folder: the bucket, or where the share is mounted; nothing where there is neither.
storage_folder() {
  if [[ -n ${options[bucket]} ]]; then
    printf '%s' "${options[bucket]}"
  elif [[ -n ${options[share]} ]]; then
    printf '%s' "${options[mount]%/}"
  fi
}

# compilation_cache: the folder of compiled programs, and of a GPU's tuning.
compilation_cache() { printf '%s' "$(storage_folder)/compilation_cache"; }

# log_folder: where the output of a machine's jobs outlives the machine. On a share it is written
# there; a bucket gets a copy when a job ends.
log_folder() {
  local folder
  folder=$(storage_folder)
  [[ -z $folder ]] || printf '%s' "$folder/launch_logs/${options[name]}"
}

# --- Queued resources: how a TPU is asked for ----------------------------------------------------

# check_accelerator: the flags of `create`.
check_accelerator() {
  need accelerator_type "a TPU's type and size, such as v5litepod-256"
  check accelerator_type "$id_form" "a TPU's type and size, such as v5litepod-256"
  need runtime_version "the TPU VM image, such as v2-alpha-tpuv5-lite for v5e"
  check runtime_version "$id_form" "the TPU VM image, such as v2-alpha-tpuv5-lite for v5e"
  check network "$id_form" "a network's name"
  check subnetwork "$id_form" "a subnetwork's name"
}

request_tpu() {
  where
  local more=()
  [[ -z ${options[spot]} ]] || more+=(--spot)
  [[ -z ${options[network]} ]] || more+=(--network="${options[network]}")
  [[ -z ${options[subnetwork]} ]] || more+=(--subnetwork="${options[subnetwork]}")
  [[ -z ${options[internal_ips]} ]] || more+=(--internal-ips)
  execute gcloud compute tpus queued-resources create "${options[name]}" \
    --node-id="${options[name]}" --accelerator-type="${options[accelerator_type]}" \
    --runtime-version="${options[runtime_version]}" "${place[@]}" "${more[@]}"
}

# --force: the slice too, not only the request. Without --async, it is gone when this returns.
delete_tpu() {
  where
  execute gcloud compute tpus queued-resources delete "${options[name]}" "${place[@]}" --force
}

# tpu_state: sets `state` to that of the request, e.g. ACTIVE, or to GONE where there is none.
# Fails where it cannot be asked for.
tpu_state() {
  local errors
  where
  local ask=(gcloud compute tpus queued-resources describe "${options[name]}" "${place[@]}"
    "--format=value(state.state)")
  if [[ -n ${options[dry_run]} ]]; then
    printable "${ask[@]}"
    state=ACTIVE
    return
  fi
  errors=$(mktemp)
  if state=$("${ask[@]}" 2>"$errors"); then
    rm -f "$errors"
    [[ -n $state ]]
  elif grep -qi -e NOT_FOUND -e 'not found' "$errors"; then
    rm -f "$errors"
    state=GONE
  else
    error_line "$errors" >&2
    rm -f "$errors"
    state=
    return 1
  fi
}

# wait_for_tpu: until the request is ACTIVE. Bounded by --wait_timeout_secs.
wait_for_tpu() {
  local start=$SECONDS last='' unanswered=0 state
  while true; do
    if tpu_state; then
      unanswered=0
      [[ $state == "$last" ]] || say "${options[name]}: $state"
      last=$state
      case $state in
        ACTIVE) return ;;
        GONE) fail "${options[name]}: no such request in ${options[zone]}; run \`create\` first" ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING)
          fail "${options[name]}: the request is $state and will not become ACTIVE;" \
            "\`delete\` it and \`create\` another"
          ;;
      esac
    elif ((++unanswered >= 5)); then
      fail "${options[name]}: its state could not be asked for, 5 times in a row"
    fi
    if ((SECONDS - start >= ${options[wait_timeout_secs]%.*})); then
      fail "${options[name]}: still ${state:-unknown} after" \
        "--wait_timeout_secs=${options[wait_timeout_secs]}; the request stays in the queue and may" \
        "become a running slice: \`wait\` again or \`delete\` it"
    fi
    sleep "${options[poll_secs]}"
  done
}
