#!/bin/sh
# Flower's SuperLink: run lifecycle and the sites' mailbox. It answers on this machine's loopback only; sites come through
# gateway.sh. Runs need superexec.sh beside it. All of its state is in superlink.db.
cd "$(dirname "$0")" || exit 1
umask 077
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
exec flower-superlink --host 127.0.0.1 --port @SUPERLINK_PORT@ \
    --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \
    --enable-supernode-auth --database superlink.db \
    --isolation process --superexec-auth-secret-file superexec.secret \
    --disable-runtime-dependency-installation
