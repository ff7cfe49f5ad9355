"""The training objective: the formulas of GRPO and its family, each in the file of its name.
Pure functions of log-probs, rewards and traces; the only collective is a sum over a context-parallel row."""
