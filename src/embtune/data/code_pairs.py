"""Training pairs for code search from Python sources: what a function does -> how it does it."""

import ast
import inspect
import os
import random
import re
import sysconfig
import tokenize
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from embtune.data.near_duplicates import distinct_rows
from embtune.data.retrieval import RetrievalData
from embtune.errors import ArgumentError, DataError

MIN_TRAIN = 32
MIN_HELD_OUT = 10

# Not code that somebody wants to find: tests, installed packages, builds, tables that are Python by suffix only.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "node_modules", "build", "dist", "test", "tests"}
    | {"idlelib", "turtledemo", "pydoc_data"}
)
_SENTENCE_END = re.compile(r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\betc\.)(?<=[.!?])\s+(?=[A-Z\"'`(\[])")
_NOT_PROSE = re.compile(r">>>|\.\. |[:@]\w+|\S+\(.*\)( *(->|=).*)?$")


@dataclass(frozen=True)
class CodePair:
    """One function."""

    sentence: str
    """First sentence of the docstring."""
    code: str
    """Source without the docstring, dedented."""
    module: PurePath
    """Source file, relative to the folder that was searched."""
    line: int
    """Line of its `def` in that file, from 1."""


@dataclass(frozen=True)
class CodePairs:
    """Pairs for training, and a retrieval set from modules that training never sees."""

    train: list[tuple[str, str]]
    """(anchor, positive) rows: sentence and code."""
    held_out: RetrievalData
    """Sentences as queries, the code of held-out functions as corpus; ids are `file:line`."""
    modules: int
    """Number of source files that the pairs come from."""
    skipped: dict[str, int]
    """Reason -> number of functions (or files, where the reason says so) left out."""


def collect_code_pairs(
    path: str | Path | None = None, *, held_out: int = 500, seed: int = 0, min_train: int = MIN_TRAIN
) -> CodePairs:
    """Read every function with a docstring below `path` (default: the standard library of the running Python).

    Near-duplicates, of sentences or of code, are removed before the split, and the split is by top-level module, so
    no held-out function has a sibling or a copy among the training pairs. The same sources and `seed` give the same
    rows in the same order.

    Args:
        path: folder of Python sources, searched recursively; folders of tests and installed packages are left out.
        held_out: largest number of held-out queries. Up to twice as many functions are held out, but no more than a
            fifth of all: those without a query make the search as hard as it is in earnest.
        seed: which modules are held out, and the order of the rows.
        min_train: smallest number of training pairs that is accepted.

    Raises:
        ArgumentError: `path` is not a folder, or `held_out` is too small.
        DataError: too few usable functions, with the count of each reason for leaving one out.
    """
    if held_out < MIN_HELD_OUT:
        raise ArgumentError(f"held_out={held_out} is too few for a comparison; use at least {MIN_HELD_OUT}.")
    root = Path(path) if path is not None else Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise ArgumentError(f"path: {root} is not a folder; give a folder of Python sources (*.py).")
    skipped: Counter[str] = Counter()
    pairs = [pair for file in _python_files(root) for pair in _pairs_of_file(file, root, skipped)]
    distinct = [pairs[i] for i in distinct_rows([(pair.sentence, pair.code) for pair in pairs])]
    skipped["near-duplicate of another function"] = len(pairs) - len(distinct)
    train, test = _split(distinct, 2 * held_out, random.Random(seed))
    if len(train) < min_train or len(test) < MIN_HELD_OUT:
        raise DataError(_too_few(root, distinct, len(train), len(test), min_train, skipped))
    return CodePairs(
        train=[(pair.sentence, pair.code) for pair in train],
        held_out=_retrieval(test, held_out),
        modules=len({pair.module for pair in distinct}),
        skipped=dict(skipped),
    )


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS
            and not name.startswith(".")
            and not Path(folder, name, "pyvenv.cfg").exists()
        )
        yield from (Path(folder, name) for name in sorted(files) if _is_source(name))


def _is_source(name: str) -> bool:
    return name.endswith(".py") and not name.startswith(("test_", "_sysconfigdata")) and name != "conftest.py"


def _pairs_of_file(file: Path, root: Path, skipped: Counter[str]) -> Iterator[CodePair]:
    try:
        with tokenize.open(file) as stream:
            source = stream.read()
        with warnings.catch_warnings():
            # The code is read, not run: its invalid escapes and the like are no concern of this reader.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except OSError:
        skipped["file that cannot be read"] += 1
        return
    except (SyntaxError, ValueError, RecursionError):
        skipped["file that this Python cannot parse"] += 1
        return
    lines = source.encode().split(b"\n")
    for function in _functions(tree):
        docstring = ast.get_docstring(function, clean=False)
        sentence = first_sentence(docstring or "")
        if reason := _unusable(function, docstring, sentence):
            skipped[reason] += 1
        else:
            code = source_without_docstring(function, lines)
            yield CodePair(sentence, code, file.relative_to(root), function.lineno)


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    # Functions inside functions are left out: their text is part of the outer one's and would match twice.
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _functions(child)


def _unusable(function: ast.FunctionDef | ast.AsyncFunctionDef, docstring: str | None, sentence: str) -> str | None:
    if docstring is None:
        return "function without a docstring"
    if len(re.findall(r"[^\W\d_]{2,}", sentence)) < 3 or _NOT_PROSE.match(sentence):
        return "docstring that does not begin with a sentence of three words"
    statements = function.body[1:]
    if not statements or (len(statements) == 1 and _does_nothing(statements[0])):
        return "function that does nothing"
    return None


def _does_nothing(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Pass | ast.Raise)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        or (isinstance(statement, ast.Return) and isinstance(statement.value, ast.Constant | None))
    )


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line; empty for an empty docstring."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0]
    return _SENTENCE_END.split(" ".join(paragraph.split()), maxsplit=1)[0]


def source_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[bytes]) -> str:
    """The function's own source text, from `def` to its end, without the docstring and without outer indentation.

    Args:
        function: a function whose first statement is its docstring.
        lines: the UTF-8 lines of the file it was parsed from, without line ends.
    """
    docstring = function.body[0]
    head = _segment(lines, (function.lineno, function.col_offset), (docstring.lineno, docstring.col_offset))
    tail = _segment(
        lines,
        (docstring.end_lineno or 0, docstring.end_col_offset or 0),
        (function.end_lineno or 0, function.end_col_offset or 0),
    )
    if tail.lstrip().startswith(";"):
        text = head + tail.lstrip(" \t;")
    else:
        text = head.rstrip() + re.sub(r"\n(\s*\n)+", "\n", tail, count=1)
    indent = lines[function.lineno - 1][: function.col_offset].decode()
    first, *rest = text.split("\n")
    return "\n".join([first, *(line.removeprefix(indent) for line in rest)]).strip()


def _segment(lines: list[bytes], start: tuple[int, int], end: tuple[int, int]) -> str:
    """Text between two (line from 1, byte column) positions."""
    part = lines[start[0] - 1 : end[0]]
    part[-1] = part[-1][: end[1]]
    part[0] = part[0][start[1] :]
    return b"\n".join(part).decode()


def _split(pairs: list[CodePair], functions: int, rng: random.Random) -> tuple[list[CodePair], list[CodePair]]:
    """Hold out whole groups of modules, at most `functions` and a fifth of all, where that leaves enough."""
    groups = _groups(pairs)
    order = sorted(groups)
    rng.shuffle(order)
    wanted = min(functions, max(len(pairs) // 5, MIN_HELD_OUT))
    test_groups: list[PurePath] = []

    def take(group: PurePath) -> None:
        test_groups.append(group)
        order.remove(group)

    def taken() -> int:
        return sum(len(groups[group]) for group in test_groups)

    # Modules that fill less than a fifth come first, so that no single one decides the result where that can be helped.
    for largest in (wanted // 5, wanted):
        for group in list(order):
            if len(groups[group]) <= min(largest, wanted - taken()):
                take(group)
    while taken() < MIN_HELD_OUT and len(order) > 1:
        take(min(order, key=lambda group: len(groups[group])))
    test = [pair for group in test_groups for pair in groups[group]]
    train = [pair for group in order for pair in groups[group]]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test[:wanted]


def _groups(pairs: list[CodePair]) -> dict[PurePath, list[CodePair]]:
    """Pairs by the first folders of their path: as few of them as leave no group more than half of the pairs.

    For the standard library that is the top-level module; for a project that keeps everything in `src/name/` it is
    the subpackage or the file.
    """
    groups: dict[PurePath, list[CodePair]] = {}
    for depth in range(1, max((len(pair.module.parts) for pair in pairs), default=0) + 1):
        groups = defaultdict(list)
        for pair in pairs:
            groups[PurePath(*pair.module.parts[:depth])].append(pair)
        if max(map(len, groups.values())) <= len(pairs) / 2:
            break
    return groups


def _retrieval(pairs: list[CodePair], queries: int) -> RetrievalData:
    named = {f"{pair.module.as_posix()}:{pair.line}": pair for pair in pairs}
    asked = list(named)[:queries]
    return RetrievalData(
        queries={name: named[name].sentence for name in asked},
        corpus={name: pair.code for name, pair in named.items()},
        relevant={name: {name} for name in asked},
    )


def _too_few(
    root: Path, pairs: list[CodePair], train: int, held_out: int, min_train: int, skipped: Counter[str]
) -> str:
    reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.most_common() if count) or "nothing else"
    files = len({pair.module for pair in pairs})
    return (
        f"{root} gives {len(pairs)} usable functions in {files} files, which split by module into {train} for training "
        f"and {held_out} held out; at least {min_train} and {MIN_HELD_OUT} are needed, from at least two files. "
        f"Left out: {reasons}. Give a larger folder, or leave --path out to use Python's standard library."
    )
