"""The controller of a job: an HTTP service that knows who takes part, and which phase the job is in."""
