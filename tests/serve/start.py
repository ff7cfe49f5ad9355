"""Serves in this process: python -m tests.serve.start FOLDER '{"api_key": ..., "limits": {...}}'."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_parallel_r1.errors import UserError
from megatron_parallel_r1.serve.admission import Limits
from megatron_parallel_r1.serve.run import serve

if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    limits = Limits(**settings.pop("limits", {}))
    try:
        serve(Path(sys.argv[1]), port=0, limits=limits, **settings)
    except UserError as error:
        sys.exit(f"error: {error}")
