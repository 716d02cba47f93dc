"""Checkpoints, architectures, and what embtune changes on a model instance."""
