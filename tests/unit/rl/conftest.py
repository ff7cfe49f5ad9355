"""The trainer fixtures of tests/unit/train."""

from tests.unit.train.conftest import trainer_of, world

__all__ = ["trainer_of", "world"]
