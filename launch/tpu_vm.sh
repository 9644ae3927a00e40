#!/usr/bin/env bash
# A stage on a slice of Cloud TPU VMs, from the queued request to its deletion.
#
# usage: tpu_vm.sh COMMAND --name=NAME --zone=ZONE [--project=PROJECT] [--dry-run] [flags]
#          [-- STAGE --config=configs/kimi_audio_7b.py:TOPOLOGY --workdir=/shared/… […]]
#
# commands:
#   create   requests the slice as a queued resource and waits for it
#              --topology=v5e-8x8|v5e-16x16|v5p-4x4x4|v6e-8x8  [--spot]
#   install  copies this checkout's last commit to every worker and installs it
#              --share=SERVER:/EXPORT  an NFS share (Filestore), mounted as /shared; its folders
#                                      checkpoints and data are seen from the checkout
#   run      starts the stage after -- on all workers, detached from this terminal
#   logs     follows the log  [--worker=0]  a number, or all
#   status   tells the state of the slice
#   stop     sends SIGTERM to all workers: the stage saves and ends
#   resume   goes on after a preemption: a new slice, installed, with the stage on it
#              (flags of create and install, and the stage)
#   delete   gives the slice back
#
# The workdir must lie on the share: every process reads and writes it, and it outlives the slice.
set -euo pipefail
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

flag_name='' flag_zone='' flag_project='' flag_topology='' flag_spot='' flag_share='' flag_worker=0
# Seconds between looks at a request that waits.
poll_s=60

queue() {
  local verb=$1
  shift
  act gcloud compute tpus queued-resources "$verb" "$flag_name" "${place[@]}" "$@"
}

on_workers() {
  act gcloud compute tpus tpu-vm ssh "$flag_name" "${place[@]}" "--worker=$1" "--command=$2"
}

state() { queue describe '--format=value(state.state)'; }

create() {
  need topology
  slice_of "$flag_topology"
  queue create "--node-id=$flag_name" "--accelerator-type=$accelerator" \
    "--runtime-version=$runtime" ${flag_spot:+--spot}
  if [[ $dry_run ]]; then
    echo "# every $poll_s s until it prints ACTIVE:"
    state
    return
  fi
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in FAILED | SUSPENDED) fail "the request ended as $now; delete it and try again." ;; esac
    echo "$(date +%T) $now"
    sleep "$poll_s"
  done
}

install() {
  need share
  local root archive
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  archive=${TMPDIR:-/tmp}/paras2s.tar.gz
  act git -C "$root" archive --prefix=paras2s/ "--output=$archive" HEAD
  act gcloud compute tpus tpu-vm scp "$archive" "$flag_name:paras2s.tar.gz" "${place[@]}" --worker=all
  # The images have an older Python than this needs; uv brings one. A file that another process has
  # just written must be seen at once: no negative look-ups are kept.
  on_workers all "set -e
sudo apt-get install -qq -y nfs-common
sudo mkdir -p /shared
mountpoint -q /shared || sudo mount -t nfs -o lookupcache=positive $(quoted "$flag_share") /shared
tar -xzf paras2s.tar.gz
python3 -m pip install -q --user uv
cd paras2s
ln -sfn /shared/checkpoints checkpoints
ln -sfn /shared/data data
~/.local/bin/uv venv -q --allow-existing --python=3.12 .venv
~/.local/bin/uv pip install -q --python=.venv/bin/python '.[tpu]'"
}

run() {
  need_stage
  on_workers all "if kill -0 \$(cat paras2s.pid) 2>/dev/null; then echo 'a stage runs here already' >&2; exit 1; fi
cd paras2s
nohup launch/stage.sh --paras2s=.venv/bin/paras2s -- $(quoted "${stage[@]}") >>~/paras2s.log 2>&1 </dev/null &
echo \$! >~/paras2s.pid"
}

resume() {
  need topology share
  need_stage
  if [[ $dry_run || $(state) != ACTIVE ]]; then
    delete
    create
    install
  fi
  run
}

delete() { queue delete --force --quiet; }

command=${1:-}
[[ $command == -h || $command == --help ]] && parse --help
shift || true
case $command in
  create | install | run | logs | status | stop | resume | delete) ;;
  '') fail "no command given; --help lists them." ;;
  *) fail "unknown command '$command'; --help lists them." ;;
esac
parse "$@"
need name zone
place=("--zone=$flag_zone" ${flag_project:+"--project=$flag_project"})
case $command in
  logs) on_workers "$flag_worker" 'tail -n 100 -F paras2s.log' ;;
  status) state ;;
  # stage.sh passes it on.
  stop) on_workers all "kill -TERM \$(cat paras2s.pid)" ;;
  *) "$command" ;;
esac
