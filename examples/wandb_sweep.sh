#!/usr/bin/env bash
# Two runs of a sweep as `wandb agent` starts them, offline: no account, no network. With an account, wandb sweep FILE prints the agent's line.
# bash examples/wandb_sweep.sh [FOLDER]        needs featherlight[wandb]
set -euo pipefail
configs=$(realpath "$(dirname "$0")/../configs")
mkdir -p "${1:-runs/wandb_sweep}" && cd "${1:-runs/wandb_sweep}"

# What an agent does for each run: W&B's variables, and the sweep's command with the parameters chosen, an option each.
export WANDB_MODE=offline WANDB_SWEEP_ID=example
for blocks in 1 2; do
    mkdir -p "wandb/sweep-$WANDB_SWEEP_ID"
    export WANDB_RUN_ID="blocks-$blocks" WANDB_SWEEP_PARAM_PATH="$PWD/wandb/sweep-$WANDB_SWEEP_ID/config-blocks-$blocks.yaml"
    printf 'wandb_version: 1\nplugins.LayerFreezing.blocks_per_stage:\n  value: %s\n' "$blocks" > "$WANDB_SWEEP_PARAM_PATH"
    python -W ignore -m featherlight federate --config="$configs/quickstart/2_layerwise.yaml" --loggers+=WandbLogger \
        --federation.rounds=2 --federation.local_epochs=1 --data.num_clients=2 --data.limit_train=192 \
        --plugins.LayerFreezing.blocks_per_stage="$blocks"
done
echo "wandb sync $PWD/wandb/offline-run-*   uploads them"
