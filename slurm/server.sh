#!/usr/bin/env bash
# Runs COMMAND, the rollout servers of one node, or its part of one server over SPAN of the nodes in SERVER_NODES; writes
# their URLs to a file of the node.
set -euo pipefail
part=()
if ((${SPAN:-1} > 1)); then
    read -ra nodes <<<"$SERVER_NODES"
    rank=$((SLURM_PROCID % SPAN))
    part=(--nodes "$SPAN" --node-rank "$rank" --rendezvous "${nodes[SLURM_PROCID - rank]}:$MASTER_PORT")
fi
exec "$@" "${part[@]}" --host 0.0.0.0 --port 0 --urls-file "$URLS.$SLURM_PROCID" --log-dir "$URLS.$SLURM_PROCID.logs"
