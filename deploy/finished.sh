#!/usr/bin/env bash
# Fail unless a run of FEDLLM_HOME has finished. Usage: deploy/finished.sh RUN_NAME
set -euo pipefail
fedllm runs --json | python -c '
import json, sys
status = {run["name"]: run["status"] for run in json.load(sys.stdin)}.get(sys.argv[1], "never started")
sys.exit(None if status == "finished" else f"the demo did not finish: {status}")' "$1"
