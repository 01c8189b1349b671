#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through xpk (pip install xpk), which also restarts failed jobs.
#
#   launch/gke.sh --workload=base --cluster=my-cluster --zone=ZONE --tpu_type=v5litepod-256 \
#       --image=us-docker.pkg.dev/project/repository/imagen-jax --config=imagen/base64.py --workdir=gs://bucket/base \
#       --config.data.path=gs://bucket/records
#
# Flags:
#   --workload=NAME     name of the job
#   --cluster=NAME      cluster that `xpk cluster create` made
#   --zone=ZONE         its zone
#   --project=PROJECT   its project (default: gcloud's own)
#   --tpu_type=TYPE     such as v5litepod-256
#   --num_slices=N      slices (default 1)
#   --image=IMAGE       container image in which imagen-jax is installed with [gcs]: launch/Dockerfile makes one
#   --restarts=N        restarts of the whole job (default 100)
#   --dry_run           only print the command
# Everything else goes to `imagen-jax train`. --workdir and records must be in cloud storage that all pods see.
set -euo pipefail

workload="" cluster="" zone="" project="" tpu_type="" num_slices=1 image="" restarts=100 dry_run=0
train=()
for argument in "$@"; do
  case "$argument" in
    --workload=*) workload="${argument#*=}" ;;
    --cluster=*) cluster="${argument#*=}" ;;
    --zone=*) zone="${argument#*=}" ;;
    --project=*) project="${argument#*=}" ;;
    --tpu_type=*) tpu_type="${argument#*=}" ;;
    --num_slices=*) num_slices="${argument#*=}" ;;
    --image=*) image="${argument#*=}" ;;
    --restarts=*) restarts="${argument#*=}" ;;
    --dry_run) dry_run=1 ;;
    *) train+=("$argument") ;;
  esac
done
for value in "$workload" "$cluster" "$zone" "$tpu_type" "$image" "${train[*]-}"; do
  if [[ -z "$value" ]]; then
    echo "usage: $0 --workload=NAME --cluster=NAME --zone=ZONE --tpu_type=TYPE --image=IMAGE [--project=PROJECT]" \
      "[--num_slices=N] [--restarts=N] [--dry_run] --config=FILE --workdir=gs://… --config.data.path=gs://… [train flags]" >&2
    exit 2
  fi
done
printf -v quoted '%q ' imagen-jax train "${train[@]}" --distributed
# xpk restarts on 127 to 255 (signals) by itself; 1 and 2, a wrong flag or a full disk, end the job.
command=(
  xpk workload create
  "--workload=$workload" "--cluster=$cluster" "--zone=$zone"
  "--tpu-type=$tpu_type" "--num-slices=$num_slices"
  "--docker-image=$image" "--max-restarts=$restarts" --restart-on-exit-codes=75
  --termination-grace-period-seconds=300
  "--command=$quoted"
)
if [[ -n "$project" ]]; then
  command+=("--project=$project")
fi
if [[ "$dry_run" == 1 ]]; then
  printf '%q ' "${command[@]}"
  printf '\n'
else
  exec "${command[@]}"
fi
