#!/usr/bin/env bash
# A stage on a slice of TPUs in a GKE cluster with JobSet, by kubectl.
#
# usage: jobset.sh --name=NAME --topology=v5e-8x8|v5e-16x16|v5p-4x4x4|v6e-8x8 --image=IMAGE
#          --claim=CLAIM [--spot] [--max-restarts=5] [--dry-run]
#          -- STAGE --config=configs/kimi_audio_7b.py:TOPOLOGY --workdir=/shared/… […]
#
#   --image=IMAGE      made from the Dockerfile beside this script
#   --claim=CLAIM      a ReadWriteMany volume claim, mounted as /shared
#   --max-restarts=5   after failures; preemptions are not counted
#
# Fills in jobset.yaml and applies it. Follow it with `kubectl logs -f -l
# jobset.sigs.k8s.io/jobset-name=NAME`; end it with `kubectl delete jobset NAME`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/flags.sh
source "$here/../flags.sh"

flag_name='' flag_topology='' flag_image='' flag_claim='' flag_spot='' flag_max_restarts=5
parse "$@"
need name topology image claim
need_stage
slice_of "$flag_topology"

# A list of strings as JSON, which is YAML too.
json_list() {
  local item list=
  for item in "$@"; do
    item=${item//\\/\\\\}
    list+=", \"${item//\"/\\\"}\""
  done
  echo "[${list#, }]"
}

manifest=$(<"$here/jobset.yaml")
fill() { manifest=${manifest//"\${$1}"/"$2"}; }
fill NAME "$flag_name"
fill MAX_RESTARTS "$flag_max_restarts"
fill NUM_VMS "$num_vms"
fill GKE_ACCELERATOR "$gke_accelerator"
fill GKE_TOPOLOGY "$gke_topology"
fill IMAGE "$flag_image"
fill CLAIM "$flag_claim"
fill STAGE "$(json_list "${stage[@]}")"
if [[ $flag_spot ]]; then
  fill SPOT true
else
  # Nodes that are not spot have no such label.
  manifest=$(grep -v 'gke-spot' <<<"$manifest")
fi

if [[ $dry_run ]]; then
  printf "kubectl apply -f - <<'EOF'\n%s\nEOF\n" "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
