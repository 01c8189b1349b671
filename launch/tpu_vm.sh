#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM or pod slice, and starts again on a host when the job may go on.
#
#   launch/tpu_vm.sh --name=my-pod --zone=us-central2-b --config=imagen/base64.py --workdir=gs://bucket/base
#
# Installs this checkout, with what gs:// paths need, on every host first (--no_install leaves that out). Flags:
#   --name=TPU          name of the TPU VM
#   --zone=ZONE         its zone
#   --project=PROJECT   its project (default: gcloud's own)
#   --restarts=N        starts after a host or process has died (default 100)
#   --no_install        the code is there already, in ~/imagen_jax
#   --dry_run           only print the commands
# Everything else goes to `imagen-jax train`. --workdir and records must be in cloud storage that all hosts see.
set -euo pipefail

name="" zone="" project="" restarts=100 install=1 dry_run=0
train=()
for argument in "$@"; do
  case "$argument" in
    --name=*) name="${argument#*=}" ;;
    --zone=*) zone="${argument#*=}" ;;
    --project=*) project="${argument#*=}" ;;
    --restarts=*) restarts="${argument#*=}" ;;
    --no_install) install=0 ;;
    --dry_run) dry_run=1 ;;
    *) train+=("$argument") ;;
  esac
done
if [[ -z "$name" || -z "$zone" || ${#train[@]} -eq 0 ]]; then
  echo "usage: $0 --name=TPU --zone=ZONE [--project=PROJECT] [--restarts=N] [--no_install] [--dry_run]" \
    "--config=FILE --workdir=gs://… [train flags]" >&2
  exit 2
fi
where=("--zone=$zone")
if [[ -n "$project" ]]; then
  where+=("--project=$project")
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
archive="${TMPDIR:-/tmp}/imagen_jax.tar.gz"

run() {
  if [[ "$dry_run" == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

if [[ "$install" == 1 ]]; then
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:imagen_jax.tar.gz" --worker=all "${where[@]}"
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" \
    --command="mkdir -p imagen_jax && tar -xzf imagen_jax.tar.gz -C imagen_jax && python3 -m pip install --quiet --editable 'imagen_jax[gcs]' 'jax[tpu]'"
fi
# Codes 1, 2 and 130 would come again: a wrong flag, a full disk, Ctrl-C.
printf -v quoted '%q ' python3 -m imagen_jax train "${train[@]}" --distributed
loop="cd imagen_jax; for start in \$(seq 0 $restarts); do $quoted; code=\$?; case \$code in 0|1|2|130) exit \$code;; esac; echo \"ended with \$code, starting again\" >&2; done; exit \$code"
run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" --command="$loop"
