#!/usr/bin/env bash
# A federation as a Flower app: a SuperLink, a SuperNode for each of two clients, TLS, keys, and `flwr run`, all on this machine.
# bash examples/flower_app.sh [FOLDER [OPTION ...]]   needs featherlight[flower]; minutes, since every message has a process that imports torch
set -euo pipefail
configs=$(realpath "$(dirname "$0")/../configs")
folder=${1:-runs/flower_app} && shift $(($# > 0))
mkdir -p "$folder" && cd "$folder"
export FLWR_HOME="$PWD/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
port=${PORT:-8000}

# the app, and keys for its clients; behind it, options as featherlight federate takes them
python -W ignore -m featherlight flower -c "$configs/quickstart/2_layerwise.yaml" --app digits-app --keys keys --data.num_clients=2 \
    --data.limit_train=192 --federation.rounds=2 --federation.local_epochs=1 --federation.folder="$PWD/run" "$@"

mkdir -p "$FLWR_HOME"
printf '[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:%s"\nroot-certificates = "%s"\n' \
    "$port" "$PWD/keys/ca.crt" > "$FLWR_HOME/config.toml"

started=()
trap 'kill "${started[@]}" 2> /dev/null || true; wait' EXIT

flower-superlink --ssl-ca-certfile keys/ca.crt --ssl-certfile keys/server.crt --ssl-keyfile keys/server.key --host 127.0.0.1 --port "$port" \
    --enable-supernode-auth --disable-runtime-dependency-installation > superlink.log 2>&1 &
started+=($!)
until (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do
    kill -0 "${started[0]}" || { cat superlink.log >&2; exit 1; }
    sleep 1
done

for client in 0 1; do
    flwr supernode register "keys/node-$client.pub"
done
for client in 0 1; do
    flower-supernode --superlink "127.0.0.1:$port" --root-certificates keys/ca.crt --auth-supernode-private-key "keys/node-$client" \
        --host 127.0.0.1 --port $((port + 100 + client)) --node-config "partition-id=$client" > "node-$client.log" 2>&1 &
    started+=($!)
done

flwr run digits-app --stream
cat run/metrics.jsonl   # the SuperLink's own folder has what featherlight federate would have written
