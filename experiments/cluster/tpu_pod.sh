#!/bin/bash
# One process on each host of a TPU slice: experiments/cluster/tpu_pod.sh NAME ZONE WORKDIR
# Each host finds the others by itself. WORKDIR must be one folder that all of them have mounted,
# such as one of Filestore.
set -euo pipefail
NAME=${1:?name of the TPU} ZONE=${2:?its zone} WORKDIR=${3:?a folder that all hosts see}
shift 3

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

on_all_hosts "pip install --quiet 'jax[tpu]' 'supcon-jax[train]'"
on_all_hosts "python -m supcon_jax.train --config resnet50 --distributed --workdir=$WORKDIR $*"
