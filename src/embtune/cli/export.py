"""`embtune export`: a model or an adapter, saved for use elsewhere; `save_export` serves training too."""

import shlex
from pathlib import Path

from rich.console import Console
from sentence_transformers import SentenceTransformer

from embtune.api import FastSentenceTransformer
from embtune.cli.config import ExportConfig
from embtune.cli.display import make_console, print_commands, working
from embtune.cli.export_choice import ExportChoice
from embtune.export.gguf_architecture import gguf_architecture
from embtune.export.graph import check_graph
from embtune.export.onnx import require_onnx
from embtune.export.openvino import require_openvino
from embtune.export.parity import collected_parities
from embtune.models.families import unwrapped
from embtune.models.modules import single_transformer
from embtune.report.events import EventLog
from embtune.runtime import require


def run_export(config: ExportConfig, console: Console | None = None) -> int:
    """Load the model, save it as asked, and return the exit code.

    Raises:
        EmbtuneError: the model cannot be loaded or saved so; nothing is left behind then.
    """
    console = console or make_console()
    choice = ExportChoice.of(config.format, config.quantization, "quantization")
    with working(console, f"Loading {config.model}"):
        # In float32 no digit of the base is lost before the adapter is added to it.
        model = FastSentenceTransformer.from_pretrained(config.model, dtype="float32", for_inference=True)
    check_export(model, choice)
    with working(console, f"Saving as {choice} in {config.out}"):
        saved = save_export(model, choice, config.out)
    console.print(f"Saved {saved}: {_bytes(saved) / 1e6:,.1f} MB.", style="bold green", soft_wrap=True)
    print_commands(console, [usage(choice, saved)])
    return 0


def check_export(model: SentenceTransformer, choice: ExportChoice) -> None:
    """Raise now what would make an export fail later, when hours of training have passed.

    Raises:
        ExportError, ModelError: this architecture has no such format.
        MissingPackageError: a package that the format needs is not installed.
    """
    if choice.format == "gguf":
        gguf_architecture(unwrapped(single_transformer(model, "A GGUF file").model).config)
    if choice.format == "torchao":
        require("torchao", "Saving with TorchAO")
    if choice.format == "onnx":
        require_onnx()
    if choice.format == "openvino":
        require_openvino()
    if choice.format in ("onnx", "openvino"):
        check_graph(model, f"The format {choice.format}")


def save_export(model: FastSentenceTransformer, choice: ExportChoice, folder: Path) -> Path:
    """Save `model` into `folder` and return that folder, or the GGUF file in it."""
    if choice.format == "gguf":
        [file] = model.save_pretrained_gguf(folder, quantization_method=str(choice.quantization))
        return file
    if choice.format == "torchao":
        return model.save_pretrained_torchao(folder, torchao_config=str(choice.quantization))
    if choice.format == "onnx":
        return model.save_pretrained_onnx(folder, quantization_method=str(choice.quantization))
    if choice.format == "openvino":
        return model.save_pretrained_openvino(folder, quantization_method=str(choice.quantization))
    method = f"merged_{choice.quantization}" if choice.quantization else "merged"
    return model.save_pretrained_merged(folder, save_method=method)


def save_export_for_report(model: FastSentenceTransformer, choice: ExportChoice, folder: Path, log: EventLog) -> Path:
    """As `save_export`, with size and parity noted among the run's events."""
    with collected_parities() as parities:
        saved = save_export(model, choice, folder)
    parity = {name: getattr(parities[-1], name) for name in ("minimum", "mean", "texts")} if parities else None
    check = "every number read back, equal as far as its type can hold it" if choice.format == "gguf" else None
    log.write("export", format=str(choice), path=saved, bytes=_bytes(saved), parity=parity, check=check)
    return saved


def _bytes(saved: Path) -> int:
    files = [saved] if saved.is_file() else [file for file in saved.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def usage(choice: ExportChoice, saved: Path) -> tuple[str, str]:
    """What for, and the command that tries an export out."""
    if choice.format == "gguf":
        return "Use it in llama.cpp:", f"llama-embedding -m {shlex.quote(str(saved))} -p 'a text'"
    purpose, code = _code(choice.format, str(saved))
    # Double quotes are easier to read, where nothing between them has a meaning for the shell.
    return purpose, "python -c " + (shlex.quote(code) if set(code) & set('"\\$`!') else f'"{code}"')


def _code(name: str, saved: str) -> tuple[str, str]:
    tokenize = f"T.from_pretrained({saved!r})(['a text'], return_tensors='np')"
    tokens = f"from transformers import AutoTokenizer as T; x = dict({tokenize})"
    if name == "onnx":
        run = f"S({saved + '/onnx/model.onnx'!r}).run(['sentence_embedding'], x)[0][0, :5]"
        return "Use it in onnxruntime:", f"from onnxruntime import InferenceSession as S; {tokens}; print({run})"
    if name == "openvino":
        run = f"compile_model({saved + '/openvino/openvino_model.xml'!r})(x)['sentence_embedding'][0, :5]"
        return "Use it in OpenVINO:", f"from openvino import compile_model; {tokens}; print({run})"
    purpose = "Use it in sentence-transformers" + (", with torchao installed:" if name == "torchao" else ":")
    return (
        purpose,
        f"from sentence_transformers import SentenceTransformer as S; print(S({saved!r}).encode('a text')[:5])",
    )
