"""Writing a trained model in every format people deploy, and checking each."""
