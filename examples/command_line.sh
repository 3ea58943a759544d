#!/usr/bin/env bash
# LightningCLI's ways with configurations: two files merged, the command line over both, the whole of it kept as a file, a run, and more of it.
# bash examples/command_line.sh [FOLDER]
set -euo pipefail
configs=$(realpath "$(dirname "$0")/../configs")
mkdir -p "${1:-runs/command_line}" && cd "${1:-runs/command_line}"
featherlight() { python -W ignore -m featherlight "$@"; }

cat > short.yaml << 'YAML'
trainer: {max_epochs: 1, enable_progress_bar: false}
data: {init_args: {limit_train: 256, batch_size: 64}}
probes: [KNN]
YAML

# the last that says something of a setting wins: file, second file, command line
featherlight fit -c "$configs/fit/layer_freezing.yaml" -c short.yaml \
    --trainer.callbacks.LayerFreezing.periods_per_stage=1 --model.lr=1e-3 --print_config > whole.yaml
grep -E "periods_per_stage|max_epochs|limit_train:|    lr:" whole.yaml

featherlight fit -c whole.yaml                                   # writes runs/whole: checkpoints, config.yaml, cost.json, timeline.png
featherlight fit -c whole.yaml --trainer.max_epochs=2 --resume   # goes on behind its last epoch
