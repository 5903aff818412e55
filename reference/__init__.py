"""The other side: a Hugging Face causal LM on one device, exact in float64, and its checkpoints."""
