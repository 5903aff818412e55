"""Benchmarks: workloads, the engines that run them, what the hardware could do at best, and rows of figures."""
