#!/usr/bin/env bash
# Runs COMMAND, the rollout servers of one node; each node writes its URLs to a file of its own.
set -euo pipefail
exec "$@" --host 0.0.0.0 --port 0 --urls-file "$URLS.$SLURM_PROCID" --log-dir "$URLS.$SLURM_PROCID.logs"
