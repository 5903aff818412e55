"""What a model is made of beside its parallel layers: attention, norms, RoPE, the sampler; and who chooses a kernel."""
