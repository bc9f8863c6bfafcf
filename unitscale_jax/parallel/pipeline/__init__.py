"""Pipeline parallelism: stages, schedules, and the ticks that carry them out."""
