"""Rank choice: budgets and candidates in, a plan out. Solvers are pure functions of a problem."""
