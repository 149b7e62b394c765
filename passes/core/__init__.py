"""Arrays only: stages, chains, factor formats, costs. Knows no graph format and no target."""
