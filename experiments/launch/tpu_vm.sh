#!/usr/bin/env bash
# A TPU slice with gcloud alone. In the folder of this repository, one after the other:
#   experiments/launch/tpu_vm.sh create   # spot; `create` again after a preemption
#   experiments/launch/tpu_vm.sh setup    # this folder and the package on every host
#   experiments/launch/tpu_vm.sh run      # starts the run, or goes on with it
#   experiments/launch/tpu_vm.sh log      # what it says, until Ctrl-C
#   experiments/launch/tpu_vm.sh stop     # SIGTERM: it saves and ends with 143
#   experiments/launch/tpu_vm.sh delete   # until then it costs money
# Change these, or set them before:
set -euo pipefail
NAME=${NAME:-vit-l16}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
# Buckets, which all hosts reach.
RUNS=${RUNS:-gs://my-bucket/runs}
DATA=${DATA:-gs://my-bucket/imagenet}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
  create)
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" \
      --accelerator-type="$TYPE" --version="$RUNTIME" --spot
    ;;
  setup)
    git archive --format=tar.gz --output=/tmp/vit_jax.tar.gz HEAD
    gcloud compute tpus tpu-vm scp /tmp/vit_jax.tar.gz "$NAME": --zone="$ZONE" --worker=all
    on_all_hosts "
      set -e
      sudo apt-get update && sudo apt-get install -y python3.11-venv
      mkdir -p vit_jax && tar -xzf vit_jax.tar.gz -C vit_jax && cd vit_jax
      python3.11 -m venv .venv
      .venv/bin/python -m pip install --constraint constraints.txt '.[tpu,gcs,plot,tensorboard]'"
    ;;
  run)
    # The processes find each other. What they say goes to a file, as this ssh does not last.
    on_all_hosts "
      cd vit_jax && PATH=\$PWD/.venv/bin:\$PATH
      nohup python -m vit_jax train \
        --config=configs/pretrain.py:L/16,imagenet,records:$DATA \
        --workdir=$RUNS/pretrain_l16 \
        --config.data.cache=/tmp/images,80GB \
        --config.precision=bfloat16 \
        --config.mesh.fsdp=16 \
        --config.checkpoint.every=500 \
        >>run.log 2>&1 </dev/null &"
    ;;
  log)
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
      --command="tail -n 50 -f vit_jax/run.log"
    ;;
  stop)
    on_all_hosts "pkill -TERM -f '^python -m vit_jax train' || true"
    ;;
  delete)
    gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"
    ;;
  *)
    echo "usage: $0 create | setup | run | log | stop | delete" >&2
    exit 2
    ;;
esac
