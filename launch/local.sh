#!/usr/bin/env bash
# Runs a stage in several processes of this machine, as one run.
#
# usage: local.sh [--processes=2] [--devices=N] [--port=P] [--paras2s=PROGRAM] [--dry-run]
#          -- STAGE --config=… --workdir=… […]
#
#   --processes=2      how many
#   --devices=N        virtual CPU devices of each (for trying a mesh without accelerators)
#   --port=P           of process 0 (default: a free-looking one)
#   --paras2s=PROGRAM  what to run (default: paras2s)
#
# Every line of output begins with the number of its process. When one process fails, the others
# end too. SIGTERM lets all of them save and end. Status as stage.sh tells it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/flags.sh
source "$here/flags.sh"

flag_processes=2 flag_devices='' flag_paras2s=paras2s
flag_port=$((20000 + RANDOM % 20000))
parse "$@"
need_stage

environment=()
if [[ $flag_devices ]]; then
  environment=(
    env JAX_PLATFORMS=cpu
    "XLA_FLAGS=${XLA_FLAGS:-} --xla_force_host_platform_device_count=$flag_devices"
  )
fi
processes=()
for ((i = 0; i < flag_processes; i++)); do
  command=(
    ${environment[@]+"${environment[@]}"} "$here/stage.sh" "--paras2s=$flag_paras2s" -- "${stage[@]}"
    "--coordinator=localhost:$flag_port" "--num_processes=$flag_processes" "--process_id=$i"
  )
  if [[ $dry_run ]]; then
    echo "$(quoted "${command[@]}") &"
  else
    "${command[@]}" > >(sed -u "s/^/$i: /") 2> >(sed -u "s/^/$i: /" >&2) &
    processes+=($!)
  fi
done
if [[ $dry_run ]]; then
  echo wait
  exit
fi

trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT
result=0
for process in "${processes[@]}"; do
  while :; do
    status=0
    wait "$process" || status=$?
    kill -0 "$process" 2>/dev/null || break
  done
  # A failure says more than having been stopped.
  if ((result == 0 || (result == 75 && status != 0))); then result=$status; fi
done
exit "$result"
