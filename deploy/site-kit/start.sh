#!/bin/sh
# Starts this site's service and returns. See it with `fedllm site status`, end it with `fedllm site stop`.
cd "$(dirname "$0")" || exit 1
exec fedllm site start .
