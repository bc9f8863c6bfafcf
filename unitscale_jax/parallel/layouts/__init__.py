"""Which dimension of each parameter lies over which mesh axis: given, inferred, checked."""
