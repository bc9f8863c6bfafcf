"""Pruning: masks, and compaction into a really smaller model."""
