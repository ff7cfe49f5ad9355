"""`parallel-r1 serve-rollout` with settings in JSON: python -m tests.unit.rollout.serving.start SETTINGS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.rollout.launcher.command import LaunchSettings
from megatron_parallel_r1.rollout.launcher.run import serve_rollout

PATHS = ("checkpoint", "python", "log_dir", "urls_file", "key_file")

if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    settings = {name: Path(value) if name in PATHS else value for name, value in values.items()}
    try:
        serve_rollout(LaunchSettings(**settings), tell=lambda line: print(line, flush=True))
    except UserError as error:
        sys.exit(f"error: {error}")
