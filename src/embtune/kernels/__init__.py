"""Tensors in, tensors out: Triton kernels, each beside its twin in plain PyTorch."""
