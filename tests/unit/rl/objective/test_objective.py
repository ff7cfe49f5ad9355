"""Settings of the objective are checked when they are made, in one line, also from a recipe."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_parallel_r1.rl.objective.settings import Objective


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregation": "constant"}, "aggregation constant needs constant_length"),
        ({"constant_length": 0}, "constant_length must be >= 1"),
        ({"clip_low": 0.0}, r"clip_low must be in \(0, 1\]"),
        ({"clip_low": 1.5}, r"clip_low must be in \(0, 1\]"),
        ({"clip_high": math.nan}, "clip_high must be > 0"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, "dual_clip belongs to surrogate ppo"),
        ({"kl_coefficient": -0.1}, "kl_coefficient must be >= 0 and finite"),
        ({"entropy_coefficient": math.inf}, "entropy_coefficient must be finite"),
        ({"correction_cap": 0.0}, "correction_cap must be > 0"),
        ({"correction": "mask", "correction_low": 2.0}, "correction_low must be >= 0 and below"),
        ({"overlong_cache": -1}, "overlong_cache must be >= 0"),
        ({"overlong_penalty": math.inf}, "overlong_penalty must be >= 0 and finite"),
        ({"path_credit": True, "ratio": "sequence"}, "path_credit needs ratio token or sequence_token"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}[^;]*$"):
        Objective(**settings)
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Objective).validate_python(settings)


def test_a_recipe_s_settings_are_read_and_unknown_keys_refused() -> None:
    read = TypeAdapter(Objective).validate_python({"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4})
    assert read == Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4)
    with pytest.raises(ValidationError, match="nonsense"):
        TypeAdapter(Objective).validate_python({"nonsense": 1})
    with pytest.raises(ValidationError, match="advantage"):
        TypeAdapter(Objective).validate_python({"advantage": "gae"})


def test_the_methods_of_the_documentation_are_accepted() -> None:
    page = (Path(__file__).parents[4] / "docs/rl.md").read_text()
    table = page.partition("| method |")[2].partition("\n\n")[0]
    found = [yaml.safe_load(text.replace("…", "3000")) for text in re.findall(r"`(\{.+?\})`", table)]
    objectives = [TypeAdapter(Objective).validate_python(settings) for settings in found]
    assert len(objectives) == 10 and len(set(objectives)) == 10 and Objective() not in objectives
