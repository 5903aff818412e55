"""Holds the engine, or another subject, against the reference; plants faults; measures."""
