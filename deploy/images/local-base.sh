#!/bin/bash
# Makes base images where no container registry can be reached: Debian with Python, with nginx, and with Prometheus, from
# Debian's packages alone. Needs root, debootstrap and a running Docker engine.
#
#   sudo deploy/images/local-base.sh                # all, or those named: base gateway prometheus
#   make compose-demo BASE=fedllm-base:local GATEWAY_BASE=fedllm-gateway-base:local
set -euo pipefail

suite=${SUITE:-bookworm}
mirror=${MIRROR:-http://deb.debian.org/debian}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# Makes an image of what a fresh Debian has with the packages named, without caches, lists and documentation. DATA is a
# folder for user 65534; what follows the packages goes to `docker import`.
make_image() {
    local name=$1 packages=$2 root=$folder/${1%%:*}
    shift 2
    debootstrap --variant=minbase --include="$packages" "$suite" "$root" "$mirror" > "$folder/log" \
        || { tail -n 20 "$folder/log" >&2; exit 1; }
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}/* "$root"/var/log/*
    [ -z "${DATA:-}" ] || install -d -o 65534 -g 65534 "$root$DATA"
    tar -C "$root" --numeric-owner -c . \
        | docker import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' "$@" - "$name" > /dev/null
    docker image ls --format '{{.Repository}}:{{.Tag}} {{.Size}}' "$name"
}

[ $# -gt 0 ] || set -- base gateway prometheus
for image in "$@"; do
    case $image in
        base) make_image fedllm-base:local python3,python3-venv,ca-certificates,libgomp1 ;;
        gateway) make_image fedllm-gateway-base:local nginx-light,gettext-base,ca-certificates ;;
        prometheus) DATA=/prometheus make_image fedllm-prometheus:local prometheus --change 'ENTRYPOINT ["/usr/bin/prometheus"]' ;;
        *) sed -n 2,6p "$0" >&2; exit 2 ;;
    esac
done
