"""Distillation: losses against a teacher, and features of functions that nobody edited."""
