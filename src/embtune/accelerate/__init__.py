"""Compiling where it pays, and passes and losses replayed as CUDA graphs."""
