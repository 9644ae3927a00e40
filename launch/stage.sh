#!/usr/bin/env bash
# Runs one stage on this machine, as one of the processes of a run, and tells the scheduler how it
# ended.
#
# usage: stage.sh [--paras2s=PROGRAM] [--dry-run] -- STAGE --config=… --workdir=… […]
#
#   --paras2s=PROGRAM  what to run (default: paras2s)
#
# SIGTERM is passed on: the stage saves and ends. Status: 0 when the stage is finished, 75 when it
# was stopped before its end (start it again), and that of paras2s when that failed.
set -euo pipefail
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

flag_paras2s=paras2s
parse "$@"
need_stage
if [[ $dry_run ]]; then
  act "$flag_paras2s" "${stage[@]}"
  exit
fi

"$flag_paras2s" "${stage[@]}" &
process=$!
trap 'kill -TERM "$process" 2>/dev/null || true' TERM
status=0
wait "$process" || status=$?
# A trapped signal ends `wait` before the process has ended.
while kill -0 "$process" 2>/dev/null; do
  status=0
  wait "$process" || status=$?
done
if ((status == 0)) && [[ ! -f $workdir/${stage[0]}/summary.json ]]; then
  echo "stage.sh: ${stage[0]} was stopped before its end; the same command goes on." >&2
  exit 75
fi
exit "$status"
