"""``shardproof atlas``: every architecture that a library knows, in many layouts, under that library's own tensor parallelism."""
