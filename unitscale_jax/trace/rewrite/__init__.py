"""Functions made anew from their equations: the Rewriter, custom derivatives, captures, notes."""

from unitscale_jax.trace.rewrite._capture import Capture, captured, picked_inside
from unitscale_jax.trace.rewrite._derivatives import Derivative
from unitscale_jax.trace.rewrite._manual import as_on_one_device
from unitscale_jax.trace.rewrite._notes import (
    as_traced,
    dtypes_meant,
    made_result,
    noted,
    notes_at,
    operand_enters,
    scope_without_notes,
    taking,
    taking_notes,
)
from unitscale_jax.trace.rewrite._rewrite import Rewriter, RewriteRules, Rule, rewritten

__all__ = [
    "Capture",
    "Derivative",
    "Rewriter",
    "Rule",
    "RewriteRules",
    "as_on_one_device",
    "as_traced",
    "captured",
    "dtypes_meant",
    "made_result",
    "noted",
    "notes_at",
    "operand_enters",
    "picked_inside",
    "rewritten",
    "scope_without_notes",
    "taking",
    "taking_notes",
]
