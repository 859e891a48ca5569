#!/usr/bin/env bash
# Run the demo federation in Flower's simulation and stop the local SuperLink that it started.
# Usage: deploy/demo/run.sh [RUN_NAME [RUN_CONFIG]]; further settings of the run config go into the second argument.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:-demo-$(date +%Y%m%d-%H%M%S)}
settings="$(grep -v '^#' deploy/demo/settings.toml | sed 's/ = /=/' | tr '\n' ' ') ${2:-}"

# A SuperLink of its own, on a free port, so that one that runs already with another environment is not used by mistake.
export FLWR_HOME=${FLWR_HOME:-$PWD/.flwr}
export FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=${FLWR_LOCAL_SUPERLINK_HTTP_API_PORT:-$(python - <<'PY'
import socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    print(free.getsockname()[1])
PY
)}
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export HF_HUB_DISABLE_TELEMETRY=1
# Ray says so itself: without it, it warns about a change of a default that does not matter here.
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0

stop_superlink() {
    # The SuperLink and, where the demo is interrupted, the simulation under it; Ray's workers follow their driver.
    local port=$FLWR_LOCAL_SUPERLINK_HTTP_API_PORT
    pgrep -f -- "flower-superlink .*--port $port|flwr-simulation .*127.0.0.1:$port" | xargs -r kill 2>/dev/null || true
}
trap stop_superlink EXIT

flwr run . --stream --run-config "name=\"$name\" $settings" \
    --federation-config "num-supernodes=4 client-resources-num-cpus=1"
deploy/finished.sh "$name"
