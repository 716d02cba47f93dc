"""Compiling where it pays, and gradient checkpointing."""
