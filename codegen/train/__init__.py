"""Training from scratch: networks trained dense, or in low-rank form from the first step (``rankc train``)."""
