"""The trainer, its arguments and its checkpoints."""
