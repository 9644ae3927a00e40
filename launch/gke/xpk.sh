#!/usr/bin/env bash
# A stage on a slice of TPUs in a GKE cluster made by xpk.
#
# usage: xpk.sh --name=NAME --cluster=CLUSTER --zone=ZONE [--project=PROJECT]
#          --topology=v5e-8x8|v5e-16x16|v5p-4x4x4|v6e-8x8 --image=IMAGE --storage=STORAGE
#          [--max-restarts=50] [--dry-run]
#          -- STAGE --config=configs/kimi_audio_7b.py:TOPOLOGY --workdir=… […]
#
#   --image=IMAGE       made from the Dockerfile beside this script
#   --storage=STORAGE   of `xpk storage attach`: a share on which the workdir lies
#   --max-restarts=50   after failures and preemptions
#
# Follow it with `xpk workload list`; end it with `xpk workload delete`.
set -euo pipefail
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/../flags.sh"

flag_name='' flag_cluster='' flag_zone='' flag_project='' flag_topology='' flag_image=''
flag_storage='' flag_max_restarts=50
parse "$@"
need name cluster zone topology image storage
need_stage
slice_of "$flag_topology"

# 75 is what stage.sh ends with when the stage was stopped before its end.
act xpk workload create "--workload=$flag_name" "--cluster=$flag_cluster" "--zone=$flag_zone" \
  ${flag_project:+"--project=$flag_project"} "--tpu-type=$accelerator" --num-slices=1 \
  "--docker-image=$flag_image" "--storage=$flag_storage" "--max-restarts=$flag_max_restarts" \
  --restart-on-exit-codes=75 "--command=launch/stage.sh -- $(quoted "${stage[@]}")"
