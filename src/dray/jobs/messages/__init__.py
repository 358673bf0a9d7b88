"""What the processes of a job exchange: wire models, messages between processes, calls of the controller."""
