#!/usr/bin/env bash
# Bench2Drive's routes with several workers on one machine, one policy server for all, and the scores at the end.
#
#   BENCH2DRIVE=~/Bench2Drive CARLA_ROOT=~/carla GPUS="0 1 2 3" configs/launch/bench2drive_workers.sh 8 \
#       'ws://127.0.0.1:8000?controller=simlingo' eval/first
#
# The server runs already, and puts the workers' requests together:
#   python -m spacedrive_jax serve --checkpoint RUN
# Run the same line again to go on.
set -euo pipefail
workers=$1 server=$2 out=$3
: "${BENCH2DRIVE:?the checkout of Thinklab-SJTU/Bench2Drive}" "${CARLA_ROOT:?the folder of CARLA 0.9.15}"
read -r -a gpus <<< "${GPUS:-0}"
routes=${ROUTES:-$BENCH2DRIVE/leaderboard/data/bench2drive220.xml}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"

# Every worker's part of the routes, each route to the next worker in turn.
python3 - "$routes" "$workers" "$out" <<'PY'
import glob, sys, xml.etree.ElementTree as tree
source, workers, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
routes = tree.parse(source).getroot().findall("route")
parts = {}
for worker in range(workers):
    root = tree.Element("routes")
    root.extend(routes[worker::workers])
    parts["%s/routes_%02d.xml" % (out, worker)] = tree.tostring(root)
# Results that lie there are of the parts that lie there: others would drive routes twice.
before = {name: open(name, "rb").read() for name in glob.glob(out + "/routes_*.xml")}
if before not in ({}, parts):
    sys.exit("%s was begun with %d workers, or other routes: give those, or another folder" % (out, len(before)))
for name, part in parts.items():
    open(name, "wb").write(part)
PY

for worker in $(seq 0 $((workers - 1))); do
    number=$(printf %02d "$worker")
    WORKER=$worker GPU_RANK=${gpus[$((worker % ${#gpus[@]}))]} ROUTES=$(cd "$out" && pwd)/routes_$number.xml \
        "$here/bench2drive.sh" "$server" "$out" > "$out/worker_$number.log" 2>&1 &
    sleep 5
done
wait || true
"$python" -m spacedrive_jax score-bench2drive "$out"/results_*.json --routes "$routes" --metric-info "$out/saved"
