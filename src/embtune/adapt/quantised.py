"""A frozen base in 4 or 8 bits, beneath float32 adapters.

4 bits are NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314) through bitsandbytes. 8 bits are
torchao's weight-only int8, one scale a row, and not bitsandbytes' LLM.int8: that one also rounds activations, on a CPU
only outside training, so that the model evaluated is neither the one trained nor the one merged.
`benchmarks/quantised_cpu.py` measures both.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, TorchAoConfig

from embtune.errors import ArgumentError, ModelError
from embtune.runtime import require

# Linear layers outside the encoder layers, as regular expressions on module names. They hold few weights, LoRA does not
# adapt them, and rounding a pooler, whose output no embedding uses, would only spoil the merged checkpoint.
_KEPT_DENSE = [".*pooler", ".*embeddings_project", ".*embedding_hidden_mapping_in", ".*lm_head"]

_DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantization_config(
    bits: int, device: torch.device, compute_dtype: torch.dtype
) -> BitsAndBytesConfig | TorchAoConfig:
    """The `quantization_config` of transformers' `from_pretrained` for a base in 4 or 8 bits on `device`.

    `compute_dtype` should be the dtype that the model is loaded in: 4-bit layers compute in it and cast their bias to
    it for good. 8-bit layers compute in the dtype of their input.

    Raises:
        ArgumentError: `bits` is neither 4 nor 8, or bitsandbytes does not run on `device`.
        MissingPackageError: bitsandbytes (4 bits) or torchao (8 bits) is not installed.
    """
    if bits == 4:
        return _nf4_config(device, compute_dtype)
    if bits == 8:
        return _int8_config()
    raise ArgumentError(f"bits={bits!r}: a base is quantised to 4 bits (load_in_4bit) or 8 bits (load_in_8bit).")


def _nf4_config(device: torch.device, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    require("bitsandbytes", "load_in_4bit")
    from bitsandbytes import supported_torch_devices

    if device.type not in supported_torch_devices:
        supported = ", ".join(sorted(supported_torch_devices))
        raise ArgumentError(
            f"load_in_4bit: bitsandbytes runs on {supported}, not on {device.type}. Give another device or drop "
            "load_in_4bit."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(_KEPT_DENSE),
    )


def _int8_config() -> TorchAoConfig:
    require("torchao", "load_in_8bit")
    from torchao.quantization import Int8WeightOnlyConfig

    # By default torchao also changes settings of torch.compile, for the whole process. Version 2 is the one whose
    # weights are an `Int8Tensor`; torchao 0.17 still has another default.
    weights = Int8WeightOnlyConfig(set_inductor_config=False, version=2)
    return TorchAoConfig(weights, modules_to_not_convert=list(_KEPT_DENSE))


def prepare_quantised_base(backbone: nn.Module) -> None:
    """Make a quantised base safe to train adapters on, in place; to be called right after loading, before any forward.

    Every parameter is frozen, and each quantised layer is kept from its backend's traps (see `_keep_unpacked`,
    `Int8Linear`). Unlike PEFT's `prepare_model_for_kbit_training`, norms and embeddings stay in the dtype they were
    loaded in: nothing trains them, and in float32 they would turn the activations between all layers into float32.
    Gradient checkpointing is not switched on either; it is a setting of its own, and without re-entrance it needs no
    gradient at the embeddings.

    Raises:
        ModelError: a forward has already repacked 4-bit weights.
    """
    backbone.requires_grad_(False)
    for name, layer in backbone.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if _is_bnb_4bit(layer.weight):
            _refuse_packed(layer.weight, name)
            _keep_unpacked(layer)
        elif _is_int8_rows(layer.weight):
            # torchao hangs a closure on each layer for printing, and pickle refuses closures.
            layer.__dict__.pop("extra_repr", None)
            layer.__class__ = Int8Linear


def _keep_unpacked(layer: nn.Module) -> None:
    # With AVX512-BF16, bitsandbytes replaces the weight in the first forward outside training by a form made for
    # inference that also rounds the scales. Later training raises, or, without bias, sends no gradient to the input.
    layer.support_avx512bf16_for_cpu = False


class Int8Linear(nn.Linear):
    """The forward of a linear layer whose weight is torchao's int8, one scale a row; set by `module.__class__`.

    torchao's own forward leaves the floating-point copy of each weight in the graph until the backward pass, so that
    training needs more memory than a dense base does. Here the backward pass makes that copy again.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in the dtype of `inputs`."""
        return _Int8Product.apply(inputs, self.weight.qdata, self.weight.scale, self.bias)


class _Int8Product(torch.autograd.Function):
    """inputs · (codes · scales)ᵀ + bias, for frozen codes [out_features, in_features] and scales [out_features, 1]."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(inputs, _dense(codes, scales, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None]:
        codes, scales = ctx.saved_tensors
        wants_inputs, _, _, wants_bias = ctx.needs_input_grad
        inputs_gradient = gradient @ _dense(codes, scales, gradient.dtype) if wants_inputs else None
        bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0) if wants_bias else None
        return inputs_gradient, None, None, bias_gradient


def _dense(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # Rounded once, from float32: these are the values that a merged model of `dtype` holds. On a CPU it is also over
    # twice as fast as a product of mixed dtypes.
    return codes.to(torch.float32).mul_(scales).to(dtype)


def dequantised_weight(layer: nn.Module) -> torch.Tensor:
    """The dense float32 weight [out_features, in_features] of a linear layer, quantised or not.

    For 4 bits and for 8 bits weight-only it is what the layer multiplies by, so a model merged from it is the one that
    was trained. bitsandbytes' LLM.int8 rounds activations as well. A dense float32 weight is returned as it is, not
    copied.

    Raises:
        ModelError: the weight was quantised by a method unknown here, or repacked by bitsandbytes for inference.
    """
    weight = layer.weight
    if _is_bnb_4bit(weight):
        return _dequantised_4bit(weight)
    if type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8:
        # bitsandbytes moves the scales, max |row|, from the weight to the layer in the first forward.
        maxima = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.to(torch.float32) * (maxima.to(torch.float32) / 127).unsqueeze(1)
    if _is_int8_rows(weight):
        return _dense(weight.qdata, weight.scale, torch.float32)
    if weight.dtype not in _DENSE_DTYPES or _is_torchao(weight):
        raise ModelError(
            f"A weight of type {type(weight).__name__} and dtype {weight.dtype} cannot be made dense here. Load the "
            "unquantised checkpoint, with load_in_4bit or load_in_8bit if it should be quantised."
        )
    return weight.detach().to(torch.float32)


def _dequantised_4bit(weight: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    _refuse_packed(weight, "A layer")
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    return dequantize_4bit(weight.data, state)


def _refuse_packed(weight: Any, name: str) -> None:
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ModelError(
            f"{name}: bitsandbytes has repacked this 4-bit weight for inference, which loses precision and cannot be "
            "trained. Load the model again and call prepare_quantised_base before its first forward."
        )


def is_quantised(backbone: nn.Module) -> bool:
    """Whether a layer of `backbone` (PEFT-wrapped or not) carries a weight quantised in a way known here."""
    return any(_scheme(module) is not None for module in backbone.modules())


def describe_quantisation(backbone: nn.Module) -> str:
    """How the base is quantised, in words for `explain()`; "not quantised" where it is not."""
    counts: dict[str, int] = {}
    for module in backbone.modules():
        scheme = _scheme(module)
        if scheme is not None:
            counts[scheme] = counts.get(scheme, 0) + 1
    return "; ".join(f"{scheme}, {count} linear layers" for scheme, count in counts.items()) or "not quantised"


def _scheme(module: nn.Module) -> str | None:
    # PEFT's wrappers hand on the weight of the layer inside them; only that layer is an nn.Linear.
    if not isinstance(module, nn.Linear):
        return None
    weight: Any = module.weight
    if _is_bnb_4bit(weight):
        nested = " with double quantisation" if weight.compress_statistics else ""
        dtype = str(module.compute_dtype).removeprefix("torch.")
        return f"{weight.quant_type.upper()} (4 bits){nested}, computing in {dtype} (bitsandbytes)"
    if type(weight).__name__ == "Int8Params":
        return "LLM.int8 (8-bit weights and activations, bitsandbytes)"
    if _is_int8_rows(weight):
        return "int8 weights, one scale a row (torchao)"
    return None


# By name, so that asking about a dense model imports neither package.
def _is_bnb_4bit(weight: Any) -> bool:
    return type(weight).__name__ == "Params4bit"


def _is_torchao(weight: Any) -> bool:
    return type(weight).__module__.startswith("torchao.")


def _is_int8_rows(weight: Any) -> bool:
    if type(weight).__name__ != "Int8Tensor" or not _is_torchao(weight):
        return False
    return weight.act_quant_kwargs is None and weight.block_size == [1, weight.shape[1]]
