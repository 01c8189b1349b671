#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM or pod slice, and starts again on a host when the job may go on.
#
#   launch/tpu_vm.sh --name=my-pod --zone=ZONE --config=imagen/base64.py --workdir=gs://bucket/base \
#       --config.data.path=gs://bucket/records
#   launch/tpu_vm.sh --name=my-pod --zone=ZONE --accelerator_type=v5litepod-256 --spot --config=imagen/base64.py …
#
# Installs this checkout as it is, changes that are not committed included, with a Python of its own and with what
# gs:// paths need, on every host first (--no_install leaves that out). Flags:
#   --name=TPU               name of the TPU VM
#   --zone=ZONE              its zone
#   --project=PROJECT        its project (default: gcloud's own)
#   --accelerator_type=TYPE  makes the TPU, as a queued resource of the same name, unless it is there; and makes it
#                            again when it has been preempted (default: it is there, and nothing is made)
#   --runtime_version=NAME   system of a TPU that is made (default: the one for its type)
#   --spot                   a TPU that is made is cheaper, and may be preempted
#   --restarts=N             starts after a host or process has died, and TPUs made after a preemption (default 100)
#   --delete                 deletes the TPU that it made once the training has ended by itself
#   --no_install             the code is there already, in ~/imagen_jax, its environment in ~/imagen_jax/.venv
#   --install_only           only that, for other commands: ~/imagen_jax/.venv/bin/imagen-jax
#   --stop                   only tells a job that runs there to save and to end, on all hosts
#   --dry_run                only print the commands
# Everything else goes to `imagen-jax train`. --workdir and records must be in cloud storage that all hosts see.
set -euo pipefail

name="" zone="" project="" type="" version="" restarts=100 install=1 only_install=0 stop=0 delete=0 dry_run=0
tier=() train=()
for argument in "$@"; do
  case "$argument" in
    --name=*) name="${argument#*=}" ;;
    --zone=*) zone="${argument#*=}" ;;
    --project=*) project="${argument#*=}" ;;
    --accelerator_type=*) type="${argument#*=}" ;;
    --runtime_version=*) version="${argument#*=}" ;;
    --spot) tier=(--spot) ;;
    --restarts=*) restarts="${argument#*=}" ;;
    --delete) delete=1 ;;
    --no_install) install=0 ;;
    --install_only) only_install=1 ;;
    --stop) stop=1 ;;
    --dry_run) dry_run=1 ;;
    --[a-z]*-*)
      if [[ "${argument%%=*}" == --*-* && "${argument%%=*}" != --config.* ]]; then
        echo "$0: ${argument%%=*}: flags here have underscores" >&2
        exit 2
      fi
      train+=("$argument")
      ;;
    *) train+=("$argument") ;;
  esac
done
if [[ -z "$name" || -z "$zone" || (${#train[@]} -eq 0 && "$only_install$stop" == 00) ]]; then
  echo "usage: $0 --name=TPU --zone=ZONE [--project=PROJECT] [--accelerator_type=TYPE [--runtime_version=NAME] [--spot]]" \
    "[--restarts=N] [--no_install] [--dry_run] --config=FILE --workdir=gs://… --config.data.path=gs://… [train flags]" >&2
  exit 2
fi
if [[ -z "$type" && ${#tier[@]} -gt 0 ]]; then
  echo "$0: --spot is about a TPU that is made: give --accelerator_type too" >&2
  exit 2
fi
where=("--zone=$zone")
if [[ -n "$project" ]]; then
  where+=("--project=$project")
fi
if [[ -z "$version" ]]; then
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
archive="${TMPDIR:-/tmp}/imagen_jax.tar.gz"
seconds="${TPU_POLL_SECONDS:-15}" # between two looks at a queued resource

away=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet)

run() {
  if [[ "$dry_run" == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Folder and archive: files as they are, whether committed or not; what git ignores stays.
# shellcheck disable=SC2329 # `run` calls it.
pack_checkout() {
  local file
  cd "$1"
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [[ -e "$file" ]]; then
      printf '%s\0' "$file"
    fi
  done | tar --create --gzip --file="$2" --null --files-from=-
}

# ACTIVE and so on; NONE: there is no such resource; UNKNOWN: Google could not be asked.
state() {
  local answer
  if answer="$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>&1)"; then
    echo "${answer##*$'\n'}"
  elif [[ "$answer" == *NOT_FOUND* || "$answer" == *"not found"* ]]; then
    echo NONE
  else
    echo "${answer##*$'\n'}" >&2
    echo UNKNOWN
  fi
}

create() {
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$type" --runtime-version="$version" ${tier[@]+"${tier[@]}"}
}

# Waits until the TPU is there; makes it where there is none or it is gone.
provide() {
  local now before=""
  if [[ "$dry_run" == 1 ]]; then
    create
    return
  fi
  while true; do
    now="$(state)"
    case "$now" in
      ACTIVE) return ;;
      NONE) create ;;
      FAILED)
        echo "$name: Google could not make it; why: gcloud compute tpus queued-resources describe $name ${where[*]}" >&2
        exit 1
        ;;
      SUSPENDED) "${away[@]}" ;;
      *)
        if [[ "$now" != "$before" ]]; then
          echo "$name: $now" >&2
        fi
        sleep "$seconds"
        ;;
    esac
    before="$now"
  done
}

# Whether the TPU has been taken away; Google's answer comes up to two minutes after its hosts are gone.
preempted() {
  local look
  for look in 1 2 3 4 5 6 7 8; do
    case "$(state)" in
      ACTIVE | UNKNOWN) ;;
      *) return 0 ;;
    esac
    if [[ "$look" -lt 8 ]]; then
      sleep "$seconds"
    fi
  done
  return 1
}

prepare() {
  run pack_checkout "$root" "$archive" || return
  run gcloud compute tpus tpu-vm scp "$archive" "$name:imagen_jax.tar.gz" --worker=all "${where[@]}" || return
  # The system's Python is too old.
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" --command="set -e; mkdir -p imagen_jax; \
find imagen_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +; tar -xzf imagen_jax.tar.gz -C imagen_jax; \
python3 -m pip install --quiet --user uv; python3 -m uv venv --quiet --allow-existing --python=3.12 imagen_jax/.venv; \
python3 -m uv pip install --quiet --python=imagen_jax/.venv/bin/python --editable 'imagen_jax[gcs]' 'jax[tpu]'"
}

# Codes 1, 2 and 130 would come again: a wrong flag, a full disk, Ctrl-C.
printf -v quoted '%q ' .venv/bin/python -m imagen_jax train "${train[@]}" --distributed
# A lost connection must not end it; whoever stops it leaves a file.
loop="trap '' HUP; rm -f imagen_jax.stop; cd imagen_jax; for start in \$(seq 0 $restarts); do $quoted; code=\$?; case \$code in 0|1|2|130) exit \$code;; esac; [ ! -e ../imagen_jax.stop ] || exit \$code; echo \"ended with \$code, starting again\" >&2; done; exit \$code"

attempt() {
  if [[ "$install" == 1 ]]; then
    prepare || return
  fi
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" --command="$loop"
}

if [[ "$stop" == 1 ]]; then
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" \
    --command="touch imagen_jax.stop; pkill -TERM -f 'imagen_jax train' || true"
  exit
fi
if [[ "$only_install" == 1 ]]; then
  if [[ -n "$type" ]]; then
    provide
  fi
  prepare
  exit
fi
if [[ -z "$type" ]]; then
  attempt
  exit
fi

# What is to become of a TPU that was made.
finish() {
  if [[ "$delete" == 1 && "$1" != 130 ]]; then
    run "${away[@]}"
  elif [[ "$dry_run" == 0 ]]; then
    echo "$name is still there, and is paid for, until: ${away[*]}" >&2
  fi
  exit "$1"
}

for ((start = 0; start <= restarts; start++)); do
  provide
  code=0
  attempt || code=$?
  if [[ "$code" == 0 || "$code" == 130 ]] || ! preempted; then
    finish "$code"
  fi
  echo "$name has been preempted, making it again" >&2
done
finish "$code"
