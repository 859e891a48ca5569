#!/usr/bin/env bash
# A federation of containers: provision it, bring it up, run it, show what came out, take it down.
# Usage: deploy/compose/demo.sh [up|run|down|all]; RUN_NAME, NUM_ROUNDS and RUN_CONFIG change the run.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${COMPOSE_DEMO:-$PWD/.compose-demo}
name=${RUN_NAME:-compose-demo-$(date +%Y%m%d-%H%M%S)}
user=$(id -u):$(id -g)
[ "$user" = 0:0 ] && user=10001:10001
compose=(docker-compose)
docker compose version > /dev/null 2>&1 && compose=(docker compose)
compose+=(--project-name "${COMPOSE_PROJECT:-fedllm-demo}" --env-file "$folder/env")
operator=("${compose[@]}" run --rm operator)

# What the operator's and the data owners' offices do before anything runs.
provision() {
    mkdir -p "$folder/runs"
    cp deploy/compose/federation.toml "$folder"
    (cd "$folder" && fedllm provision federation.toml)
    python deploy/compose/demo_data.py "$folder/sites"
    for kit in "$folder"/demo/kits/site-?; do
        sed -i -e 's#^source = .*#source = "file:/data"#' -e 's#^state_dir = .*#state_dir = "/var/lib/fedllm/state"#' \
            -e 's#^cache_dir = .*#cache_dir = "/var/lib/fedllm/cache"#' "$kit/site.toml"
        [ -s "$kit/superexec.secret" ] || (umask 077 && head -c 32 /dev/urandom > "$kit/superexec.secret")
    done
    if [ "$(id -u)" = 0 ]; then chown -R "$user" "$folder"; fi
    cat > "$folder/env" <<ENV
FEDERATION=$folder/demo
SITES=$folder/sites
RUNS=$folder/runs
FEDLLM_USER=$user
GATEWAY_BASE=${GATEWAY_BASE:-nginx:1.28-bookworm}
GATEWAY_ADDRESS=${GATEWAY_ADDRESS:-127.0.0.1:8443}
ENV
}

online() {
    "${operator[@]}" flwr supernode list demo --format json 2> /dev/null | grep -c '"status": *"online"' || true
}

up() {
    provision
    "${compose[@]}" up --detach
    echo "waiting for the SuperLink, and registering the sites' keys"
    for site in site-a site-b; do
        for _ in $(seq 30); do
            answer=$("${operator[@]}" flwr supernode register "/federation/sites/$site.pub" demo --name "$site" 2>&1) && break
            case $answer in *"already"*) break ;; esac
            sleep 2
        done
    done
    echo "waiting for both sites"
    for _ in $(seq 60); do
        [ "$(online)" -ge 2 ] && return
        sleep 3
    done
    "${compose[@]}" logs --tail 20 >&2
    echo "the sites did not come up" >&2
    return 1
}

run() {
    "${operator[@]}" flwr run /opt/app demo --stream --run-config "name=\"$name\" num_rounds=${NUM_ROUNDS:-1} \
        transport.bind=\"0.0.0.0\" transport.insecure=true transport.advertise=\"gateway:8443\" \
        data.max_train_examples=16 data.max_holdout_examples=16 train.local_steps=4 train.learning_rate=3e-3 \
        evaluation.local_only=false ${RUN_CONFIG:-}"
}

down() {
    "${compose[@]}" --profile operator down --volumes
}

case ${1:-all} in
    up) up ;;
    run) run ;;
    down) down ;;
    all)
        trap down EXIT
        up
        run
        export FEDLLM_HOME=$folder
        deploy/finished.sh "$name"
        fedllm runs
        docker image ls --format '{{.Repository}} {{.Size}}' | grep '^fedllm-\(server\|site\) '
        ;;
    *) sed -n 2,3p "$0" >&2; exit 2 ;;
esac
