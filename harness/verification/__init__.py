"""Holding a subject against the reference: results, budgets, the first wrong module, what went wrong, saved cases."""
