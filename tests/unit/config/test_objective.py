"""Settings of the objective are checked when they are made, in one line, also from a recipe."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from megatron_parallel_r1.config.objective import Objective
from megatron_parallel_r1.utils.settings import first_problem


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregation": "constant"}, "aggregation constant needs constant_length"),
        ({"constant_length": 0}, r"constant_length\n.*greater than or equal to 1"),
        ({"clip_low": 0.0}, r"clip_low\n.*greater than 0"),
        ({"clip_low": 1.5}, r"clip_low\n.*less than or equal to 1"),
        ({"clip_high": math.nan}, r"clip_high\n.*greater than 0"),
        ({"dual_clip": 1.0}, r"dual_clip\n.*greater than 1"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, "dual_clip belongs to surrogate ppo"),
        ({"kl_coefficient": -0.1}, r"kl_coefficient\n.*greater than or equal to 0"),
        ({"entropy_coefficient": math.inf}, r"entropy_coefficient\n.*finite number"),
        ({"correction_cap": 0.0}, r"correction_cap\n.*greater than 0"),
        ({"correction": "mask", "correction_low": 2.0}, "correction_low must be >= 0 and below"),
        ({"overlong_cache": -1}, r"overlong_cache\n.*greater than or equal to 0"),
        ({"overlong_penalty": math.inf}, r"overlong_penalty\n.*finite number"),
        ({"path_credit": True, "ratio": "sequence"}, "path_credit needs ratio token or sequence_token"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as raised:
        Objective(**settings)
    assert raised.value.error_count() == 1 and "\n" not in first_problem(raised.value, Objective)


def test_a_recipe_s_settings_are_read_and_unknown_keys_refused() -> None:
    read = Objective.model_validate({"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4})
    assert read == Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4)
    with pytest.raises(ValidationError, match="nonsense"):
        Objective.model_validate({"nonsense": 1})
    with pytest.raises(ValidationError, match="advantage"):
        Objective.model_validate({"advantage": "gae"})


def test_the_methods_of_the_documentation_are_accepted() -> None:
    page = (Path(__file__).parents[3] / "docs/rl.md").read_text()
    table = page.partition("| method |")[2].partition("\n\n")[0]
    found = [yaml.safe_load(text.replace("…", "3000")) for text in re.findall(r"`(\{.+?\})`", table)]
    objectives = [Objective.model_validate(settings) for settings in found]
    assert len(objectives) == 12 and len(set(objectives)) == 12 and Objective() not in objectives
