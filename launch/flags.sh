# shellcheck shell=bash
# Sourced by the scripts beside it: their flags, and --dry-run.
# Each script's own comment at its top is its --help.

# A script sets flag_NAME (with _ for -) to the default of each flag that it has, then calls
# `parse "$@"`. What follows `--` is in the array `stage`.
dry_run=
stage=()

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" | grep -v '^shellcheck\|^SBATCH'
}

parse() {
  local variable
  while (($#)); do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --dry-run) dry_run=1 ;;
      --) shift; stage=("$@"); return ;;
      --*)
        variable=flag_${1#--}
        variable=${variable%%=*}
        variable=${variable//-/_}
        declare -p "$variable" >/dev/null 2>&1 || fail "unknown flag ${1%%=*}; --help lists them."
        # Without a value it is a switch.
        [[ $1 == *=* ]] && printf -v "$variable" '%s' "${1#*=}" || printf -v "$variable" 1
        ;;
      *) fail "unexpected argument '$1'; what paras2s gets follows --." ;;
    esac
    shift
  done
}

# need NAME…: refuses to go on without these flags.
need() {
  local name variable
  for name in "$@"; do
    variable=flag_${name//-/_}
    [[ -n ${!variable} ]] || fail "no --$name given; --help tells what it is."
  done
}

# Refuses to go on unless `-- STAGE --config=… --workdir=…` was given; sets workdir.
need_stage() {
  local argument has_config=
  workdir=
  ((${#stage[@]})) || fail "no stage given, as in: ${0##*/} … -- grpo --config=… --workdir=…"
  [[ ${stage[0]} != -* ]] || fail "the stage comes first after --, as in: -- grpo ${stage[0]}"
  for argument in "${stage[@]}"; do
    case $argument in
      --config=*) has_config=1 ;;
      --workdir=*) workdir=${argument#*=} ;;
    esac
  done
  [[ -n $has_config ]] || fail "no --config=… given after --."
  [[ -n $workdir ]] || fail "no --workdir=… given after --: all processes need the same folder."
}

# A command as it can be pasted into a shell.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

# Runs a command; with --dry-run, prints it.
act() {
  if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# The slice that a topology of configs/kimi_audio_7b.py stands for: sets accelerator (gcloud's and
# xpk's name: chips, but cores on v5p), runtime (of TPU VMs), gke_accelerator, gke_topology, and
# num_vms, of 4 chips each in every slice of several VMs.
# shellcheck disable=SC2034
slice_of() {
  case $1 in
    v5e-8x8) accelerator=v5litepod-64 runtime=v2-alpha-tpuv5-lite num_vms=16 ;;
    v5e-16x16) accelerator=v5litepod-256 runtime=v2-alpha-tpuv5-lite num_vms=64 ;;
    v5p-4x4x4) accelerator=v5p-128 runtime=v2-alpha-tpuv5 num_vms=16 ;;
    v6e-8x8) accelerator=v6e-64 runtime=v2-alpha-tpuv6e num_vms=16 ;;
    *) fail "--topology=$1 is none of v5e-8x8, v5e-16x16, v5p-4x4x4, v6e-8x8." ;;
  esac
  gke_topology=${1#*-}
  case $1 in
    v5e-*) gke_accelerator=tpu-v5-lite-podslice ;;
    v5p-*) gke_accelerator=tpu-v5p-slice ;;
    v6e-*) gke_accelerator=tpu-v6e-slice ;;
  esac
}
