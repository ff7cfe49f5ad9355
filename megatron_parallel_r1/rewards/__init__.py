"""From a response to a reward: the final answer, its equivalence to a reference, the format, the terms.

`judge` ties them together, `registry` names the rewards that a recipe can ask for.
"""
