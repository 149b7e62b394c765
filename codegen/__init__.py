"""From a network and a budget to a binary and a report: command line, targets, pipeline, emission."""
