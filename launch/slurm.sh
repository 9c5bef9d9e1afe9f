#!/usr/bin/env bash
# Submits a training to Slurm: one task per GPU, on as many nodes as asked for. See docs/launch.md.
#
#   ./launch/slurm.sh --nodes=2 --gpus_per_node=8 --time=24:00:00 [flags] -- main ARGUMENT...
#
# main, evaluate or sample. Two minutes before its time is over, or when Slurm takes it away, the job
# saves and puts itself back into the queue; it goes on from there. The repository, the environment
# and the run's folder must be on a file system that all nodes see.
#
#   --nodes=1 --gpus_per_node=1      tasks are their product
#   --time=LIMIT                     as Slurm writes it, e.g. 24:00:00; needed
#   --job_name=cascaded_diffusion --partition=NAME --account=NAME --qos=NAME --constraint=WORDS
#   --cpus_per_task=8 --mem_per_gpu=SIZE
#   --log_dir=FOLDER                 default: slurm_logs in the current folder
#   --python=PYTHON                  default: .venv/bin/python of the repository
#   --save_secs=120                  how long before the end the trainers are told to save
#   --dry_run                        prints the command, runs none
#
# Exit codes: 0 submitted, 2 bad input, others are sbatch's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

options=([nodes]=1 [gpus_per_node]=1 [time]="" [job_name]=cascaded_diffusion [partition]=""
  [account]="" [qos]="" [constraint]="" [cpus_per_task]=8 [mem_per_gpu]="" [log_dir]=slurm_logs
  [python]="" [save_secs]=120 [dry_run]="")
switches=([dry_run]=1)

parse_flags "$@"
for flag in nodes gpus_per_node cpus_per_task save_secs; do
  need "$flag" "$whole_words"
  check "$flag" "$whole_form" "$whole_words"
done
need time "a time limit, such as 24:00:00"
check time '^[0-9]+(-[0-9]+)?(:[0-9]+){0,2}$' "a time limit as Slurm writes it, such as 24:00:00"
# MINUTES[:SECONDS], HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]]; none at all is no limit.
IFS=: read -r hours minutes seconds <<<"${options[time]#*-}"
days=0
if [[ ${options[time]} == *-* ]]; then
  days=${options[time]%%-*}
elif [[ -z $seconds ]]; then
  seconds=$minutes minutes=$hours hours=0
fi
limit=$((((10#$days * 24 + 10#$hours) * 60 + 10#${minutes:-0}) * 60 + 10#${seconds:-0}))
((limit == 0 || limit > options[save_secs])) ||
  die "--time=$(shown "${options[time]}"): expected more than --save_secs=${options[save_secs]}" \
    "seconds, which is how long before its end a job is told to save"
need job_name "a name"
check job_name '^[A-Za-z0-9_][-A-Za-z0-9_.]*$' "letters, digits and -._, the first not a -"
for flag in partition account qos; do
  check "$flag" '^[A-Za-z0-9_][-A-Za-z0-9_.,]*$' "letters, digits and -._, the first not a -"
done
check mem_per_gpu '^[0-9]+[KMGT]?$' "a size as Slurm writes it, such as 64G"
need log_dir "a folder"
# Slurm fills in %-patterns of file names; a backslash turns that off for the whole name.
[[ ${options[log_dir]} != *\\* ]] ||
  die "--log_dir=$(shown "${options[log_dir]}"): expected a folder without a backslash"
module=${rest[0]:-}
case $module in
  main | evaluate | sample) ;;
  *) die "-- $(shown "$module"): expected main, evaluate or sample, and its arguments" ;;
esac
python=${options[python]:-$repository/.venv/bin/python}
command -v -- "$python" >/dev/null ||
  die "--python=$(shown "$python"): no such program; make the environment with" \
    "\`pip install -e '.[cuda]'\`, or name its Python"

logs=$(realpath -m -- "${options[log_dir]}")
[[ -n ${options[dry_run]} ]] || mkdir -p -- "$logs"
submit=(sbatch --parsable
  --job-name="${options[job_name]}" --nodes="${options[nodes]}"
  --ntasks-per-node="${options[gpus_per_node]}" --gpus-per-node="${options[gpus_per_node]}"
  --cpus-per-task="${options[cpus_per_task]}" --time="${options[time]}"
  # To the tasks, not to the batch shell (that would be B:TERM): they save, and say so by 75.
  --signal="TERM@${options[save_secs]}"
  --requeue --open-mode=append
  --output="${logs//%/%%}/%x-%j.log" --chdir="$repository")
for flag in partition account qos constraint; do
  [[ -z ${options[$flag]} ]] || submit+=("--$flag=${options[$flag]}")
done
[[ -z ${options[mem_per_gpu]} ]] || submit+=(--mem-per-gpu="${options[mem_per_gpu]}")
submit+=("$repository/launch/slurm_job.sh" "$python" -m "cascaded_diffusion.$module" "${rest[@]:1}")
# One task of one: nobody to find.
if ! finds_peers "${rest[@]:1}"; then
  if ((options[nodes] * options[gpus_per_node] > 1)); then
    submit+=(--distributed=slurm)
  else
    submit+=(--distributed=none)
  fi
fi
need_program sbatch "run this where Slurm's commands are"
execute "${submit[@]}"
