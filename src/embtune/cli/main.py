"""`embtune`, the command: finds the verb, parses its flags, runs it, and turns mistakes into one message."""

import argparse
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any, TextIO

from embtune import __version__
from embtune.cli.config import (
    CacheConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    ReportConfig,
    WatchConfig,
)
from embtune.cli.data_config import CheckConfig, InitConfig, MineConfig
from embtune.cli.lookup_config import CompletionConfig, InspectConfig
from embtune.cli.parsing import parse, parse_train
from embtune.cli.train_config import TrainConfig
from embtune.errors import ArgumentError, EmbtuneError, EmbtuneWarning

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended
VERBOSE_VARIABLE = "EMBTUNE_VERBOSE"

_VERBS = {
    "demo": "teach a small model to find code by what it does, and watch it get better",
    "init": "write a commented config for `train` from your data",
    "check": "look for what is wrong with your data, and write it cleaned",
    "mine": "find hard negatives for your pairs",
    "train": "fine-tune a model on your pairs, and show what it gained",
    "evaluate": "measure one or more models on the same data",
    "export": "save a model for sentence-transformers, llama.cpp, TorchAO, ONNX or OpenVINO",
    "report": "write the page that shows what a run did, or compares several",
    "watch": "show that page while a run goes on",
    "inspect": "show what a folder holds, and what is wrong with it",
    "cache": "show, cut back or clear the token ids that are kept between runs",
    "completion": "let the Tab key complete all of this in your shell",
}

_SMALLER = "Take a smaller --batch-size or a shorter --max-seq-length"
_LESS_MEMORY = {
    "demo": "Take a smaller --batch-size.",
    "init": "Close other programs, or name a part of the data.",
    "check": "Close other programs, or check the data in parts.",
    "mine": f"{_SMALLER}, or --dtype bfloat16.",
    "train": f"{_SMALLER}; or --gradient-checkpointing selective (or whole), or --load-in-4bit; and where a batch must "
    "stay large for its negatives, --loss CachedMultipleNegativesRankingLoss --loss-args mini_batch_size=16.",
    "evaluate": f"{_SMALLER}, or --dtype bfloat16.",
    "export": "Close other programs, or export on a machine with more memory.",
    "report": "Close other programs, or name fewer runs.",
    **dict.fromkeys(("watch", "inspect", "cache", "completion"), "Close other programs."),
}
"""What helps each verb to do with less memory."""

CONFIGS: dict[str, Any] = {
    "demo": DemoConfig,
    "init": InitConfig,
    "check": CheckConfig,
    "mine": MineConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "watch": WatchConfig,
    "inspect": InspectConfig,
    "cache": CacheConfig,
    "completion": CompletionConfig,
}
"""The options of each verb."""

_ALONE = ("inspect", "completion")
"""Verbs that use none of the libraries that there is something to quieten about, and need not wait for them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for a mistake in input, 2 in usage, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments or os.environ.get(VERBOSE_VARIABLE, "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--verbose"]
    try:
        return _run(_verb(arguments[:1] or ["--help"]), arguments[1:], verbose)
    except SystemExit as end:  # of a parser, which has printed what there is to say
        return end.code if isinstance(end.code, int) else 2
    except EmbtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that is not to be written: the message names it
        if verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:  # of PyTorch; it has no class of its own for a CPU without memory
        if verbose or not _is_out_of_memory(error):
            raise
        print(f"error: {_about_memory(error, arguments[0])}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C.", file=sys.stderr)
        return INTERRUPTED


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: PyTorch is imported with the verb, and may not be yet.
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "DefaultCPUAllocator: " in str(error)


def _about_memory(error: BaseException, verb: str) -> str:
    what = " ".join(str(error).partition("DefaultCPUAllocator: ")[2].split()) or " ".join(str(error).split())
    what = what.partition(" If reserved but unallocated")[0]  # PyTorch goes on with settings of its allocator
    return f"Out of memory{f' ({what})' if what else ''}. {_LESS_MEMORY[verb]}"


def _run(verb: str, arguments: list[str], verbose: bool) -> int:
    _refuse_repeated(arguments)
    # The flags are parsed before PyTorch is imported: help and mistakes in usage come at once.
    config: Any = parse_train(arguments) if verb == "train" else parse(CONFIGS[verb], verb, arguments)
    with nullcontext() if verb in _ALONE else _quiet(verbose):
        module = import_module(f"embtune.cli.{verb}")
        exit_code: int = getattr(module, f"run_{verb}")(config)
        return exit_code


def _verb(arguments: list[str]) -> str:
    verbs = "\n".join(f"  {verb:<12}{what}" for verb, what in _VERBS.items())
    parser = argparse.ArgumentParser(
        prog="embtune",
        usage="embtune VERB [OPTIONS]",
        description=f"Fine-tune sentence-embedding models, prove the gain, ship the result.\n\nverbs:\n{verbs}",
        epilog="`embtune VERB --help` shows a verb's options. For a first look: embtune demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"embtune {__version__}")
    parser.add_argument(
        "--verbose", action="store_true", help=f"show what libraries say, too (or {VERBOSE_VARIABLE}=1)"
    )
    parser.add_argument("verb", metavar="VERB", help=argparse.SUPPRESS)
    found: str = parser.parse_args(arguments).verb
    if found not in _VERBS:
        near = difflib.get_close_matches(found.lower(), _VERBS, 1, cutoff=0.5)
        hint = f"Did you mean `embtune {near[0]}`?" if near else f"There are {', '.join(_VERBS)}."
        parser.error(f"there is no command {found!r}. {hint}")
    return found


def _refuse_repeated(arguments: list[str]) -> None:
    """Of a flag that is given twice tyro would take the last, and drop, say, one of two data sets in silence."""
    flags = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise ArgumentError(f"{flag} is given twice. Several values stand behind one flag: {flag} A B.")


@contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Show embtune's own warnings as one line each, and keep what other libraries say off the screen.

    Everything is put back at the end: this belongs to the command, not to a program that calls `main`.
    """
    with warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", EmbtuneWarning)
        warnings.showwarning = _one_line_each(warnings.showwarning)
        if verbose:
            yield
            return
        disabled = logging.root.manager.disable
        # Levels of single loggers would not do: libraries set their own when they are imported.
        logging.disable(logging.WARNING)
        try:
            with _no_bars():
                yield
        finally:
            logging.disable(disabled)


def _one_line_each(others: Any) -> Any:
    """A `warnings.showwarning` that prints each of embtune's messages once, and passes on what others warn of."""
    shown: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, EmbtuneWarning):
            others(message, category, filename, lineno, file, line)
        elif str(message) not in shown:
            shown.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    return show


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of transformers and datasets, such as those of loading weights; downloads keep theirs.

    Where nobody watches a terminal there are none at all: tqdm reads that from the environment when it is imported.
    """
    disabled = os.environ.get("TQDM_DISABLE")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    import datasets
    from transformers.utils import logging as transformers_logging

    had = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        os.environ.pop("TQDM_DISABLE", None)
        if disabled is not None:
            os.environ["TQDM_DISABLE"] = disabled
        if had[0]:
            transformers_logging.enable_progress_bar()
        if had[1]:
            datasets.enable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
