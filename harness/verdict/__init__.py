"""``shardproof verdict``: two streams of log-probabilities of the same tokens, and one answer: rounding, bug, or can't tell."""
