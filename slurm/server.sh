#!/usr/bin/env bash
# The rollout servers of one node: they write their URLs to a file of the node's own.
set -euo pipefail
exec "$@" --host 0.0.0.0 --port 0 --urls-file "$URLS.$SLURM_PROCID" --log-dir "$URLS.$SLURM_PROCID.logs"
