"""Jobs on a cluster: what one runs, how its attempts went, whether it goes on. `slurm/` calls it."""
