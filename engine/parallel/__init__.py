"""Tensor parallelism proper: who owns which indices, parallel layers, collectives. No process in it."""
