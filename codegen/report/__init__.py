"""The report of a run: JSON against a published schema, CSV, HTML and the console."""
