"""Stands in for vLLM where SGLang runs on a CPU: SGLang imports one kernel of it there and never calls it."""
