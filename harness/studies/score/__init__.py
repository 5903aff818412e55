"""Pairs of streams whose answer is known, and the rules that are asked: for ``python -m harness.studies.scoreboard``."""
