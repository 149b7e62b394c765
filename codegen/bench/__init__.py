"""Benchmarks: each one file, one frozen dataclass whose fields are its options, one name in the registry."""
