"""The `dray` command."""
