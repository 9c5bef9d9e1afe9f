#!/usr/bin/env bash
# Trains on a TPU slice of Google Kubernetes Engine, as a JobSet. See docs/launch.md.
#
#   ./launch/gke.sh COMMAND --name=NAME [flags] [-- main ARGUMENT...]
#
#   render     prints the JobSet
#   apply      renders it and gives it to kubectl
#   logs       follows the output of --worker, 0 by default
#   delete     the JobSet: SIGTERM to the trainers, which save, then its pods are gone. The node pool
#              stays and costs money, unless it scales down by itself.
#
#   --namespace=default --context=CONTEXT      where kubectl puts it
#   --image=IMAGE                              made by launch/gke/Dockerfile; needed
#   --topology=4x4                             the slice's, as its node pool's; needed
#   --accelerator=tpu-v5-lite-podslice --chips_per_host=4
#   --bucket=gs://BUCKET/FOLDER                where runs are; or
#   --claim=CLAIM --mount=/mnt/share           a share's PersistentVolumeClaim (ReadWriteMany)
#   --spot                                     on spot nodes
#   --service_account=NAME                     which may read and write the bucket
#   --max_restarts=10                          after crashes; preemptions do not count
#   --grace_secs=120                           to save in, after SIGTERM
#   --worker=0                                 of logs
#   --dry_run                                  apply, logs, delete: prints the command, runs none
#
# Needs python3 here. Exit codes: 0 done, 2 bad input, others are kubectl's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

options=([name]="" [namespace]=default [context]="" [image]="" [topology]=""
  [accelerator]=tpu-v5-lite-podslice [chips_per_host]=4 [bucket]="" [claim]="" [mount]=/mnt/share [spot]=""
  [service_account]="" [max_restarts]=10 [grace_secs]=120 [worker]=0 [dry_run]="")
switches=([spot]=1 [dry_run]=1)

# The values of the template, as JSON: made from arguments, so that none is read as code.
# shellcheck disable=SC2016
values='
import json, sys

keys = ["name", "namespace", "image", "topology", "accelerator", "cache"]
numbers = ["chips_per_host", "max_restarts", "grace_secs", "hosts"]
claim, mount, *words = sys.argv[1:]
given = {key: words.pop(0) for key in keys}
given |= {key: int(words.pop(0)) for key in numbers}
given["spot"] = "true" if words.pop(0) else None
given["service_account"] = words.pop(0) or None
given["command"] = words
given["mounts"] = given["volumes"] = None
if claim:
    given["mounts"] = [{"name": "share", "mountPath": mount}]
    given["volumes"] = [{"name": "share", "persistentVolumeClaim": {"claimName": claim}}]
json.dump(given, sys.stdout)
'

# hosts_of_topology: sets `hosts`: the chips of the slice by those of a host.
hosts_of_topology() {
  local factor chips=1
  for factor in ${options[topology]//x/ }; do chips=$((chips * factor)); done
  if ((chips < options[chips_per_host])); then
    die "--chips_per_host=${options[chips_per_host]}: --topology=${options[topology]} has $chips" \
      "chips; expected at most those"
  fi
  ((chips % options[chips_per_host] == 0)) ||
    die "--chips_per_host=${options[chips_per_host]}: expected a divisor of the $chips chips of" \
      "--topology=${options[topology]}"
  hosts=$((chips / options[chips_per_host]))
}

render() {
  local words=() hosts key
  hosts_of_topology
  for key in claim mount name namespace image topology accelerator; do
    words+=("${options[$key]}")
  done
  words+=("$(compilation_cache)")
  for key in chips_per_host max_restarts grace_secs; do words+=("${options[$key]}"); done
  words+=("$hosts" "${options[spot]}" "${options[service_account]}"
    python -m "cascaded_diffusion.${rest[0]}" "${rest[@]:1}")
  # UTF-8 whatever the locale is.
  python3 -X utf8 -c "$values" "${words[@]}" |
    python3 -X utf8 "$repository/launch/gke/render.py" "$repository/launch/gke/jobset.yaml"
}

kubernetes() {
  local command=(kubectl)
  [[ -z ${options[context]} ]] || command+=(--context="${options[context]}")
  execute "${command[@]}" --namespace="${options[namespace]}" "$@"
}

action=${1:-}
case $action in
  render | apply | logs | delete) shift ;;
  --help | -h)
    usage
    exit 0
    ;;
  *) die "$(shown "$action"): no such command; expected render, apply, logs or delete" ;;
esac
parse_flags "$@"
need name "the JobSet's name"
# Pods are named NAME-trainer-0-WORKER-xxxxx, which has to stay below 64 letters.
check name '^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' \
  "at most 40 of a-z, 0-9 and -, the first a letter, the last not a -"
need namespace "a namespace"
check namespace "$name_form" "$name_words"
check service_account "$name_form" "$name_words"
need worker "a worker's number"
check worker '^[0-9]{1,4}$' "a worker's number"

if [[ $action == render || $action == apply ]]; then
  need image "the image made by launch/gke/Dockerfile"
  need topology "the slice's topology, such as 4x4"
  check topology '^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$' "the slice's topology, such as 4x4"
  options[share]=${options[claim]}
  [[ -n ${options[bucket]}${options[claim]} ]] ||
    die "--bucket: missing, expected gs://BUCKET/FOLDER, or --claim=CLAIM, the PersistentVolumeClaim" \
      "of a share; add --bucket=VALUE"
  [[ -z ${options[bucket]} || -z ${options[claim]} ]] ||
    die "--claim=$(shown "${options[claim]}"): expected none with --bucket; leave one of them out"
  need accelerator "the node pool's label, such as tpu-v5-lite-podslice"
  check mount '^/[^/].*' "an absolute folder, such as /mnt/share"
  need mount "an absolute folder, such as /mnt/share"
  for flag in chips_per_host grace_secs; do
    need "$flag" "$whole_words"
    check "$flag" "$whole_form" "$whole_words"
  done
  need max_restarts "$count_words"
  check max_restarts "$count_form" "$count_words"
  case ${rest[0]:-} in
    main | evaluate | sample) ;;
    *) die "-- $(shown "${rest[0]:-}"): expected main, evaluate or sample, and its arguments" ;;
  esac
  # The claim's form is Kubernetes' business.
  options[share]=''
  check_storage
  options[share]=${options[claim]}
  check_workdir "${rest[0]}" "${rest[@]:1}"
  [[ $action == render ]] || check_bucket
elif ((${#rest[@]})); then
  die "$action: takes nothing after \`--\`, got $(shown "${rest[0]}")"
fi

[[ $action == logs || $action == delete ]] || need_program python3 "it fills in the template"
[[ $action == render ]] || need_program kubectl "install it, and point it at the cluster"
case $action in
  render) render ;;
  apply)
    jobset=$(render)
    kubernetes apply --filename=- <<<"$jobset"
    ;;
  logs)
    # Both labels are set by Kubernetes: the worker is the pod's index.
    kubernetes logs --follow --container=trainer --selector="jobset.sigs.k8s.io/jobset-name=${options[name]},batch.kubernetes.io/job-completion-index=${options[worker]}"
    ;;
  delete) kubernetes delete jobset "${options[name]}" ;;
esac
