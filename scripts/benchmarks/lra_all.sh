#!/usr/bin/env bash
# Butterfly attention on all tasks of the Long Range Arena, with the seeds' block sizes
# (Solving-LRA-PathX, LRA/code/run_tasks.sh), then the leaderboard. Continues where it stopped.
#
#   scripts/benchmarks/lra_all.sh                       one fixed run a task, the reference's presets
#   scripts/benchmarks/lra_all.sh --seeds 3             three runs a task: mean and standard deviation
#   scripts/benchmarks/lra_all.sh --studies             a search a task, with dmx.tune's own budget
#   scripts/benchmarks/lra_all.sh --attention nystrom   another attention, in its default size
#   scripts/benchmarks/lra_all.sh --tasks "text image" --storage /shared/runs --data-root /shared/data
#   scripts/benchmarks/lra_all.sh --dry-run             only print the commands
#   scripts/benchmarks/lra_all.sh -- train.num_steps=100 optim.warmup_steps=10
#                                            what follows -- is given to every run: settings of
#                                            dmx.train, or options of dmx.tune with --studies
#
# Where a task's data are missing and cannot be generated, its sample stands in, which the
# leaderboard keeps apart; with --data-root missing data are an error.
set -euo pipefail

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "$0"; }
refuse() { echo "lra_all.sh: $1 (see $0 --help)" >&2; exit 2; }

attention=butterfly seeds=1 studies=no dry=no storage=runs data_root=
tasks="listops text retrieval image pathfinder32-curv_contour_length_14"
python=${PYTHON:-python}
while [ $# -gt 0 ]; do
  case $1 in
    --attention | --seeds | --tasks | --storage | --data-root)
      [ $# -ge 2 ] || refuse "$1 needs a value"
      case $1 in
        --attention) attention=$2 ;;
        --seeds) seeds=$2 ;;
        --tasks) tasks=$2 ;;
        --storage) storage=$2 ;;
        --data-root) data_root=$2 ;;
      esac
      shift 2
      ;;
    --studies) studies=yes; shift ;;
    --dry-run) dry=yes; shift ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) refuse "unknown option $1" ;;
  esac
done
[[ $seeds =~ ^[1-9][0-9]*$ ]] || refuse "--seeds is $seeds; it must be a whole number above 0"

sized() {  # the attention with the seeds' block size of the task
  [ "$attention" = butterfly ] || { echo "$attention"; return; }
  case $1 in
    listops) echo butterfly-64 ;;
    text) echo butterfly-256 ;;
    retrieval) echo butterfly-128 ;;
    image) echo butterfly-32 ;;
    pathfinder32-*) echo butterfly-128 ;;
    *) refuse "no block size is known for task $1; give --attention butterfly-SIZE" ;;
  esac
}

do_it() {  # print a command, and run it
  printf '+'; printf ' %q' "$@"; printf '\n'
  [ "$dry" = yes ] && return
  local code=0
  "$@" || code=$?
  [ $code -ne 130 ] || exit 130  # Ctrl-C ends all of it
  return $code
}

shared=(--storage "$storage")
[ -z "$data_root" ] || shared+=(--data-root "$data_root")
failed=()
for task in $tasks; do
  label=$(sized "$task")
  if [ "$studies" = yes ]; then
    name="lra-$attention-$task"
    command=("$python" -m dmx.tune --attention "$attention" --task "$task" --name "$name"
      "${shared[@]}" --final-seeds "$seeds" "$@")
    [ ! -e "$storage/$name" ] || command+=(--resume)
    do_it "${command[@]}" || failed+=("$name")
    continue
  fi
  for ((i = 0; i < seeds; i++)); do
    name="lra-$label-$task-seed$((2023 + i))"
    if [ -e "$storage/$name/result.json" ]; then
      echo "$name is done."
      continue
    fi
    command=("$python" -m dmx.train --attention "$label" --task "$task" --name "$name"
      "${shared[@]}")
    [ ! -e "$storage/$name" ] || command+=(--resume)
    command+=("train.seed=$((2023 + i))" "data.seed=$((123 + i))" "$@")
    do_it "${command[@]}" || failed+=("$name")
  done
done
do_it "$python" -m dmx.leaderboard "$storage"
if [ ${#failed[@]} -gt 0 ]; then
  echo "lra_all.sh: these did not end well: ${failed[*]}. Run it again to continue them." >&2
  exit 1
fi
