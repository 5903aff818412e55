"""Model families, one file each, and the table of modules that loading, checks and benchmarks read."""
