#!/bin/sh
# Prints what Kubernetes must be given of the files that `fedllm provision` made: keys and certificates as a Secret, and of a
# site's kit its address, node config and policy as ConfigMaps. Pipe it into kubectl, again after every renewal:
#
#   deploy/kubernetes/objects.sh server lung-study/server | kubectl apply --namespace fedllm --filename -
#   deploy/kubernetes/objects.sh site hospital-a | kubectl apply --namespace fedllm-site --filename -
set -eu
case ${1:-}:${2:+folder} in
    server:folder | site:folder) ;;
    *) sed -n 2,6p "$0" >&2; exit 2 ;;
esac
cd "$2"

# object KIND... NAME FILE...: the files under their own names, or under the name before a "=".
object() { kubectl create "$@" --dry-run=client --output=yaml && echo ---; }

case $1 in
    server)
        object secret generic federation --from-file=ca.crt --from-file=server.crt --from-file=server.key \
            --from-file=superexec.secret --from-file=revoked.pem --from-file=site-certificates.conf
        ;;
    site)
        [ -s superexec.secret ] || (umask 077 && head -c 32 /dev/urandom > superexec.secret)
        object secret generic kit --from-file=ca.crt --from-file=node.key --from-file=site.crt --from-file=site.key \
            --from-file=superexec.secret
        server=$(sed -n 's/^server = "\(.*\)"$/\1/p' kit.toml)
        : "${server:?kit.toml names no server}"
        node=$(echo 'site-config = "/kit/site.toml"' && sed '1,/^\[node_config\]$/d' kit.toml)
        object configmap site --from-literal=server="$server" --from-literal=node.toml="$node"
        object configmap policy --from-file=site.toml
        ;;
esac
