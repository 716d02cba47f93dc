import ast
import sysconfig
from pathlib import Path

import pytest

from embtune.data.code_pairs import CodePairs, collect_code_pairs, first_sentence, source_without_docstring
from embtune.data.general_text import general_retrieval
from embtune.data.near_duplicates import distinct_rows, word_set
from embtune.errors import ArgumentError, DataError

WORDS = ["alpha", "bravo", "carol", "delta", "echo", "fox", "golf", "hotel", "india", "juliet"]


def write_functions(file: Path, names: list[str]) -> None:
    """One function per name, no two of them alike."""
    file.parent.mkdir(parents=True, exist_ok=True)
    template = '''
def {n}_of({n}_row, scale_{n}):
    """Compute {n} from its {n}_row quickly."""
    {n}_total = sum({n}_row)
    return {n}_total * scale_{n}
'''
    file.write_text("".join(template.format(n=name) for name in names), encoding="utf-8")


@pytest.fixture(scope="module")
def stdlib() -> CodePairs:
    return collect_code_pairs()


def functions_without_docstring(source: str) -> list[tuple[ast.FunctionDef, str]]:
    lines = source.encode().split(b"\n")
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [(node, source_without_docstring(node, lines)) for node in found if ast.get_docstring(node) is not None]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f(a):\n    """Doc."""\n    return a\n', "def f(a):\n    return a"),
        ('def f(a):\n    """Doc.\n\n    More.\n    """\n\n    return a\n', "def f(a):\n    return a"),
        ('def f(a): "Doc."; return a\n', "def f(a): return a"),
        ('def f(a):\n    "Doc."; b = a\n    return b\n', "def f(a):\n    b = a\n    return b"),
        ('def f(a):\n    # why\n    """Doc."""  # so\n    return a\n', "def f(a):\n    # why  # so\n    return a"),
        ('class C:\n    def f(self):\n        """Doc."""\n        return 1\n', "def f(self):\n    return 1"),
        ('class C:\n\tdef f(self):\n\t\t"""Doc."""\n\t\treturn 1\n', "def f(self):\n\treturn 1"),
        ('def f(ü="é"):\n    """Döc."""\n    return "ß" + ü\n', 'def f(ü="é"):\n    return "ß" + ü'),
        ('@cache\ndef f(a):\n    """Doc."""\n    return a\n', "def f(a):\n    return a"),
    ],
)
def test_docstring_is_cut_out_and_nothing_else(source: str, expected: str) -> None:
    [(_, text)] = functions_without_docstring(source)
    assert text == expected


@pytest.mark.parametrize("module", ["textwrap.py", "argparse.py", "shutil.py", "email/message.py", "asyncio/tasks.py"])
def test_cut_source_parses_to_the_same_statements(module: str) -> None:
    source = Path(sysconfig.get_path("stdlib"), module).read_text(encoding="utf-8")
    functions = functions_without_docstring(source)
    assert functions
    for node, text in functions:
        if len(node.body) == 1:
            continue
        [again] = ast.parse(text).body
        assert isinstance(again, ast.FunctionDef)
        assert [ast.unparse(s) for s in again.body] == [ast.unparse(s) for s in node.body[1:]]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return it. Then stop.", "Return it."),
        ("\n    Return it\n    all at once\n\n    Details.", "Return it all at once"),
        ("Take a name, e.g. Anna, i.e. What fits. Go.", "Take a name, e.g. Anna, i.e. What fits."),
        ("Return 3.5 of them", "Return 3.5 of them"),
        ("", ""),
    ],
)
def test_first_sentence(docstring: str, sentence: str) -> None:
    assert first_sentence(docstring) == sentence


def test_standard_library_gives_thousands_of_pairs_without_leaks(stdlib: CodePairs) -> None:
    held_out = stdlib.held_out
    assert len(stdlib.train) > 2000
    assert len(held_out.queries) == 500
    assert 700 <= len(held_out.corpus) <= 1000
    assert held_out.queries.keys() == held_out.relevant.keys() < held_out.corpus.keys()
    assert all(held_out.relevant[name] == {name} for name in held_out.queries)
    for column, texts in ((0, held_out.queries), (1, held_out.corpus)):
        trained = {row[column] for row in stdlib.train}
        assert trained.isdisjoint(texts.values())
    assert not any(query in held_out.corpus[name] for name, query in held_out.queries.items() if len(query) > 40)


def test_no_module_is_on_both_sides(tmp_path: Path) -> None:
    for number in range(12):
        write_functions(tmp_path / f"part{number}" / "mod.py", [f"{word}{number}" for word in WORDS])
    pairs = collect_code_pairs(tmp_path, held_out=20)
    held = {name.split("/")[0] for name in pairs.held_out.corpus}
    assert held
    for folder in held:
        number = folder.removeprefix("part")
        assert not any(f"alpha{number}_of" in code for _, code in pairs.train)
    assert len(pairs.train) + len(pairs.held_out.corpus) == 120
    assert pairs.modules == 12


def test_same_seed_same_rows_and_another_seed_others(tmp_path: Path) -> None:
    for number in range(12):
        write_functions(tmp_path / f"m{number}.py", [f"{word}{number}" for word in WORDS])
    first, again, other = (collect_code_pairs(tmp_path, held_out=20, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.train != other.train
    assert set(first.held_out.corpus) != set(other.held_out.corpus)


def test_a_project_in_one_package_is_split_below_it(tmp_path: Path) -> None:
    for number in range(8):
        write_functions(tmp_path / "src" / "package" / f"m{number}.py", [f"{word}{number}" for word in WORDS])
    pairs = collect_code_pairs(tmp_path)
    assert len(pairs.train) == 70
    [file] = {name.split(":")[0] for name in pairs.held_out.corpus}
    assert file.startswith("src/package/m")


def test_small_modules_add_up_to_a_held_out_set(tmp_path: Path) -> None:
    for number in range(12):
        write_functions(tmp_path / f"m{number}.py", [f"{word}{number}" for word in WORDS[:4]])
    pairs = collect_code_pairs(tmp_path, held_out=10)
    assert len(pairs.held_out.corpus) == 10
    assert len(pairs.train) == 36


def test_copies_and_other_peoples_code_are_left_out(tmp_path: Path) -> None:
    for number in range(8):
        write_functions(tmp_path / f"m{number}.py", [f"{word}{number}" for word in WORDS])
    for copy in ("copy.py", ".hidden/x.py", "site-packages/x.py", "tests/x.py", "test_x.py", "env/x.py"):
        write_functions(tmp_path / copy, [f"{word}{'0' if copy == 'copy.py' else copy[:3]}" for word in WORDS])
    (tmp_path / "env" / "pyvenv.cfg").touch()
    (tmp_path / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "odd.py").write_text(
        'def f():\n    """Do all of nothing."""\n\ndef g():\n    "\\d is odd here"; return [1]\n', encoding="utf-8"
    )
    pairs = collect_code_pairs(tmp_path)
    assert len(pairs.train) + len(pairs.held_out.corpus) == 81
    assert pairs.skipped["near-duplicate of another function"] == 10
    assert pairs.skipped["file that this Python cannot parse"] == 2
    assert pairs.skipped["function that does nothing"] == 1


def test_too_little_code_is_refused_with_counts(tmp_path: Path) -> None:
    write_functions(tmp_path / "one.py", WORDS)
    (tmp_path / "two.py").write_text("def f(a):\n    return a\n" * 3, encoding="utf-8")
    with pytest.raises(DataError, match=r"10 usable functions in 1 files.*3 × function without a docstring.*--path"):
        collect_code_pairs(tmp_path)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"path: .*missing is not a folder"):
        collect_code_pairs(tmp_path / "missing")
    with pytest.raises(ArgumentError, match=r"held_out=3"):
        collect_code_pairs(tmp_path, held_out=3)


def test_distinct_rows_equals_comparing_everything_with_everything(stdlib: CodePairs) -> None:
    rows = [row for pair in stdlib.train[:150] for row in (pair, (pair[0] + " again", "other " + pair[1]))]

    def close(a: str, b: str) -> bool:
        first, second = word_set(a), word_set(b)
        return len(first & second) >= 0.7 * len(first | second)

    expected: list[int] = []
    for i, row in enumerate(rows):
        if not any(close(row[0], rows[j][0]) or close(row[1], rows[j][1]) for j in expected):
            expected.append(i)
    assert distinct_rows(rows, threshold=0.7) == expected
    assert 100 < len(expected) <= 160
    assert distinct_rows([]) == []


def test_general_text_is_prose_that_training_has_not_seen(stdlib: CodePairs) -> None:
    data = general_retrieval()
    assert len(data.queries) > 200
    assert data.queries.keys() == data.corpus.keys() == data.relevant.keys()
    assert all(data.relevant[name] == {name} for name in data.queries)
    assert all(text[0] in '"“*' or text[0].isupper() for text in data.queries.values())
    assert not any("::=" in text or ("def " in text and ":\n" in text) for text in data.corpus.values())
    first = data.queries["paragraph 1"]
    without = general_retrieval([first.upper()])
    assert first not in without.queries.values()
    assert len(without.queries) == len(data.queries) - 1
    assert general_retrieval([text for row in stdlib.train for text in row]).queries == data.queries
