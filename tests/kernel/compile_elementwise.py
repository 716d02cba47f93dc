"""Compile the element-wise kernels for NVIDIA GPUs without having one; run by test_compiles.py."""

from types import ModuleType

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from embtune.kernels import (
    add_norm_triton,
    gated_triton,
    layer_norm_triton,
    norm_rotary_triton,
    rms_norm_triton,
    rotary_triton,
)

INTEGERS = ("T", "D", "C", "P", "threshold")
STRIDES = ("_stride", "_token", "_head")
FLOATS = ("eps", "scale")
FLOAT32 = ("mean_T", "rstd_T", "weight_parts_PD", "bias_parts_PD", "parts", "cos_PD", "sin_PD")
# The stream of `add_norm`.
WIDE = ("residual_TD", "sum_TD", "sum_grad_TD", "residual_grad_TD")


def type_of(name: str, half: str, wide: tuple[str, ...] = FLOAT32) -> str:
    if name in INTEGERS or name.endswith(STRIDES):
        return "i32"
    if name in FLOATS:
        return "fp32"
    return "*i64" if name == "seed" else "*fp32" if name in wide else f"*{half}"


def build(module: ModuleType, kernel: str, half: str, capability: int, absent: tuple[str, ...] = (), **fixed) -> None:
    function = getattr(module, kernel)
    fixed |= dict.fromkeys(absent)
    wide = FLOAT32 + WIDE if module is add_norm_triton else FLOAT32
    signature = {name: "constexpr" if name in fixed else type_of(name, half, wide) for name in function.arg_names}
    source = ASTSource(function, signature, constexprs={(function.arg_names.index(k),): v for k, v in fixed.items()})
    compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    print(kernel, half, capability)


for capability, half, tile in ((80, "fp16", {"R": 8, "BLOCK": 128}), (90, "bf16", {"R": 1, "BLOCK": 1024})):
    build(layer_norm_triton, "add_norm_forward", half, capability, **tile)
    build(layer_norm_triton, "add_norm_backward", half, capability, STEPS=2, **tile)
    frozen = ("seed", "hidden_grad_TD", "weight_parts_PD", "bias_parts_PD")
    build(layer_norm_triton, "add_norm_backward", half, capability, absent=frozen, STEPS=1, **tile)
    for unit_offset in (False, True):
        build(rms_norm_triton, "rms_forward", half, capability, UNIT_OFFSET=unit_offset, **tile)
        build(rms_norm_triton, "rms_backward", half, capability, UNIT_OFFSET=unit_offset, STEPS=2, **tile)
    for form in ({"CENTRED": True, "UNIT_OFFSET": False}, {"CENTRED": False, "UNIT_OFFSET": True}):
        build(add_norm_triton, "add_norm_forward", half, capability, **form, **tile)
        build(add_norm_triton, "add_norm_backward", half, capability, STEPS=2, **form, **tile)
    frozen = ("hidden_TD", "bias_D", "sum_TD", "normal_TD", "rstd_T")
    build(add_norm_triton, "add_norm_forward", half, capability, absent=frozen, **form, **tile)
    heads = {"HEADS": 4, "R": 8, "HALF": 24, "BLOCK": 32}
    for inverse in (False, True):
        joined = {"INVERSE": inverse, "Q_BLOCKS": 3, "K_BLOCKS": 3, "BLOCKS": 9}
        build(rotary_triton, "rotate_heads", half, capability, **joined, **heads)
    apart = {"INVERSE": False, "Q_BLOCKS": 3, "K_BLOCKS": 1, "BLOCKS": 4}
    build(rotary_triton, "rotate_heads", half, capability, absent=("v_THD", "v_out_THD"), **apart, **heads)
    for unit_offset in (False, True):
        normed = {"UNIT_OFFSET": unit_offset, "Q_BLOCKS": 3, "K_BLOCKS": 1}
        build(norm_rotary_triton, "norm_rotate_forward", half, capability, **normed, **heads)
        build(norm_rotary_triton, "norm_rotate_backward", half, capability, **normed, **heads)
    build(norm_rotary_triton, "norm_rotate_backward", half, capability, absent=("parts",), **normed, **heads)
for activation in ("silu", "gelu", "gelu_tanh"):
    for kernel in ("gated_forward", "gated_backward"):
        build(gated_triton, kernel, "bf16", 90, ACTIVATION=activation, R=4, BLOCK=256)
