"""The formats of an export, as flags and config files write them."""

from collections.abc import Mapping
from dataclasses import dataclass

from embtune.errors import ArgumentError

QUANTIZATIONS: Mapping[str, tuple[str, ...]] = {
    "merged": ("16bit", "32bit"),
    "gguf": ("q8_0", "f16", "bf16", "f32"),
    "torchao": ("int8_weight_only", "int8_dynamic"),
    "onnx": ("f32", "int8"),
    "openvino": ("f32", "f16"),
}
"""Formats of an export and their quantisations; the first is the default, but for merged models."""


@dataclass(frozen=True)
class ExportChoice:
    """A format with its quantisation, as `gguf:q8_0` writes it."""

    format: str
    """A key of `QUANTIZATIONS`."""
    quantization: str | None
    """One of its values; None only for a merged model, which then keeps the checkpoint's dtype."""

    @classmethod
    def parse(cls, text: str) -> "ExportChoice":
        """Read `FORMAT` or `FORMAT:QUANTISATION`.

        Raises:
            ArgumentError: one of them does not exist.
        """
        name, _, quantization = text.partition(":")
        return cls.of(name, quantization or None, f"exports: {text!r}")

    @classmethod
    def of(cls, name: str, quantization: str | None, what: str) -> "ExportChoice":
        """Check a format and its quantisation; `what` begins the message."""
        if name not in QUANTIZATIONS:
            raise ArgumentError(f"{what} is no format; there are {', '.join(QUANTIZATIONS)}.")
        known = QUANTIZATIONS[name]
        if quantization is not None and quantization not in known:
            raise ArgumentError(f"{what}: {name} has no quantization {quantization!r}; it has {', '.join(known)}.")
        if quantization is None and name != "merged":
            quantization = known[0]
        return cls(name, quantization)

    @property
    def folder_name(self) -> str:
        """Where it is saved within a run's folder; GGUF files, which carry their quantisation, share one."""
        return self.format if self.format == "gguf" else str(self).replace(":", "-")

    def __str__(self) -> str:
        return f"{self.format}:{self.quantization}" if self.quantization else self.format
