"""Graph in, smaller graph out: the rewriting half of rankc."""
