"""Starts rollout servers of a checkpoint, restarts one that crashed, ends them all with itself.

settings.py   what is asked       commands.py  an engine's command line    places.py  interpreter, GPUs, ports
child.py      one server          guard.py     its parent process          supervisor.py  all of them
run.py        `parallel-r1 serve-rollout`
"""
