"""Published figures of real machines, and what this package says of the same layers. Nothing here enters a price."""
