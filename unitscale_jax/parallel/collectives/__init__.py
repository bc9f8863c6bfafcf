"""Bodies for a `shard_map` of one's own: tensor, sequence, vocabulary and expert parallel."""
