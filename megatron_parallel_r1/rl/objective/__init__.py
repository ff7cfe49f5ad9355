"""What a policy is trained towards: the formulas of GRPO and its family, each in the file of its name.
Pure functions of log-probs, rewards and traces; no model, no process group but for one sum over a row."""
