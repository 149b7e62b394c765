"""The experiments behind the tables of docs/results.md that train networks, each re-run whole by one command."""
