"""A model's folder: found, checked against its config, and loaded shard by shard."""
