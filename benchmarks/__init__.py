"""What dray costs on this machine, beside what the machine itself costs in the same run; see README.md."""
