#!/usr/bin/env bash
# Bench2Drive's routes with one worker: one CARLA, one evaluator, the agent asking a policy server that runs.
#
#   BENCH2DRIVE=~/Bench2Drive CARLA_ROOT=~/carla configs/launch/bench2drive.sh ws://127.0.0.1:8000 eval/first
#
# Starts again with --resume until every route has a record: a crash of CARLA loses the route it happened in.
# Worker 3 of several, on GPU 1, with its part of the routes (see bench2drive_workers.sh):
#   WORKER=3 GPU_RANK=1 ROUTES=eval/first/routes_03.xml configs/launch/bench2drive.sh ws://HOST:8000 eval/first
set -euo pipefail
server=$1 out=$2
: "${BENCH2DRIVE:?the checkout of Thinklab-SJTU/Bench2Drive}" "${CARLA_ROOT:?the folder of CARLA 0.9.15}"
worker=${WORKER:-0}
python=${CARLA_PYTHON:-python}   # 3.7 or 3.8, with CARLA's egg, numpy, opencv-python, msgpack and websockets
attempts=${ATTEMPTS:-20}
here=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
# The evaluator is started from its own folder: names that are relative to this one are made whole.
BENCH2DRIVE=$(realpath "$BENCH2DRIVE") CARLA_ROOT=$(realpath "$CARLA_ROOT")
case $python in */*) python=$(realpath -s "$python") ;; esac

export CARLA_ROOT IS_BENCH2DRIVE=True
export SCENARIO_RUNNER_ROOT=$BENCH2DRIVE/scenario_runner LEADERBOARD_ROOT=$BENCH2DRIVE/leaderboard
export PYTHONPATH=$CARLA_ROOT/PythonAPI:$CARLA_ROOT/PythonAPI/carla:$LEADERBOARD_ROOT:$SCENARIO_RUNNER_ROOT:${PYTHONPATH:-}
for egg in "$CARLA_ROOT"/PythonAPI/carla/dist/carla-0.9.15-py3.7-linux-x86_64.egg; do
    [ -f "$egg" ] && export PYTHONPATH=$egg:$PYTHONPATH
done
export GPU_RANK=${GPU_RANK:-0}
ROUTES=$(realpath "${ROUTES:-$LEADERBOARD_ROOT/data/bench2drive220.xml}")
export ROUTES
export TEAM_AGENT=$here/spacedrive_jax/driving/bench2drive_agent.py TEAM_CONFIG=$server
SAVE_PATH=$(realpath -m "${SAVE_PATH:-$out/saved}")
export SAVE_PATH
export CHECKPOINT_ENDPOINT=$out/results_$(printf %02d "$worker").json
mkdir -p "$SAVE_PATH"

# Whether every route of this worker has a record.
finished() {
    [ -f "$CHECKPOINT_ENDPOINT" ] && "$python" - "$CHECKPOINT_ENDPOINT" <<'PY'
import json, sys
progress = json.load(open(sys.argv[1]))["_checkpoint"]["progress"]
sys.exit(not (len(progress) == 2 and progress[0] >= progress[1] > 0))
PY
}

for attempt in $(seq "$attempts"); do
    finished && break
    # --resume is read as true for any text; the first run has nothing to go on with.
    resume=()
    [ -f "$CHECKPOINT_ENDPOINT" ] && resume=(--resume=True)
    echo "worker $worker: attempt $attempt"
    (cd "$BENCH2DRIVE" && "$python" leaderboard/leaderboard/leaderboard_evaluator.py \
        --routes="$ROUTES" --repetitions=1 --track=SENSORS --checkpoint="$CHECKPOINT_ENDPOINT" \
        --agent="$TEAM_AGENT" --agent-config="$TEAM_CONFIG" --debug=0 --record= \
        --port=$((30000 + 150 * worker)) --traffic-manager-port=$((50000 + 150 * worker)) \
        --gpu-rank="$GPU_RANK" "${resume[@]}") || echo "worker $worker: the evaluator ended with an error"
    finished || sleep 5
done
finished || { echo "worker $worker: routes are left after $attempts attempts"; exit 1; }
