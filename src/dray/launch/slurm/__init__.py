"""Jobs on Slurm: from the job file to a batch script, and the life of a run there."""
