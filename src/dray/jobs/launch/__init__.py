"""`dray run`: the supervisor of a job, its processes, and what they leave behind."""
