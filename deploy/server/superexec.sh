#!/bin/sh
# Starts the ServerApp of every run. A process of its own, so that a run survives a restart of the SuperLink; the secret keeps
# others on this machine from taking its work.
cd "$(dirname "$0")" || exit 1
export FLWR_HOME="$PWD/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
exec flower-superexec --runtime-api-address 127.0.0.1:@SUPERLINK_PORT@ --root-certificates ca.crt \
    --superexec-auth-secret-file superexec.secret
