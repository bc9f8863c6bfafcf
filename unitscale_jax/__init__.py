"""Pure-functional transforms that make Flax models cheaper to train and to serve."""
