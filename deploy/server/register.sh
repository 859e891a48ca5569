#!/bin/sh
# Brings the SuperLink's list of sites in line with this folder: lets out who is in revoked/, lets in who is in sites/.
# Safe to run often. Flower's id of a site is kept beside its key (NAME.node); delete those files if superlink.db is lost.
here=$(cd "$(dirname "$0")" && pwd) || exit 1
cd "$here" || exit 1
export FLWR_HOME="$here/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
failed=0

for key in revoked/*.pub; do
    site=$(basename "$key" .pub)
    for node in "sites/$site.node" "revoked/$site.node"; do
        [ -s "$node" ] || continue
        if flwr supernode unregister "$(cat "$node")" @FEDERATION@; then
            mv "$node" "revoked/$site.node.out"
        else
            failed=1
        fi
    done
done

for key in sites/*.pub; do
    [ -e "$key" ] || continue
    site=$(basename "$key" .pub)
    if [ -s "sites/$site.node" ] || [ -e "revoked/$site.pub" ]; then
        continue
    fi
    answer=$(flwr supernode register "$key" @FEDERATION@ --name "$site" --format json)
    id=$(printf '%s' "$answer" | sed -n 's/.*"node-id": *"\{0,1\}\([0-9][0-9]*\).*/\1/p')
    if [ -n "$id" ]; then
        printf '%s\n' "$id" > "sites/$site.node"
        echo "$site is registered as node $id"
    else
        echo "$site could not be registered: $answer" >&2
        failed=1
    fi
done
exit $failed
