#!/usr/bin/env bash
# Train on all hosts of a Cloud TPU slice. From the repository's root:
#   ZONE=us-east5-a STORE=10.0.0.2:/runs research/launch/tpu_vm.sh create
#   ZONE=us-east5-a STORE=10.0.0.2:/runs research/launch/tpu_vm.sh run architecture/gqa --scale=gpu --workdir=/runs/gqa
#   ZONE=us-east5-a research/launch/tpu_vm.sh delete
# STORE is an NFS share, e.g. of Filestore: every host mounts it at /runs. After `run` was cut off,
# the same line goes on; after the slice was taken away, `create` comes first.
set -euo pipefail

TPU=${TPU:-ablate}
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
: "${ZONE:?the zone of the slice}"

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
create)
    : "${STORE:?server:/share of the storage that all hosts mount}"
    gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" --accelerator-type="$TYPE" \
        --version="$VERSION"
    dist=$(mktemp -d)
    python3 -m pip wheel --quiet --no-deps --wheel-dir "$dist" .
    gcloud compute tpus tpu-vm scp "$dist"/ablate-*.whl "$TPU": --zone="$ZONE" --worker=all
    # The image's own Python is older than 3.11, so uv brings one.
    on_all_hosts "set -e
sudo apt-get update -qq && sudo apt-get install -qq nfs-common
sudo mkdir -p /runs && sudo mount -t nfs '$STORE' /runs
python3 -m pip install --user --quiet uv
python3 -m uv venv --python 3.12 ablate
python3 -m uv pip install --python ablate \"ablate[tpu] @ file://\$(ls ~/ablate-*.whl)\""
    ;;
run)
    shift
    on_all_hosts "ABLATE_DISTRIBUTED=1 ablate/bin/ablate run ${*@Q}"
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$TPU" --zone="$ZONE" --quiet
    ;;
*)
    echo "usage: $0 create | run NAME [options of ablate run] | delete" >&2
    exit 2
    ;;
esac
