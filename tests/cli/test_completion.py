import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from embtune.cli.main import CONFIGS, main

needs_bash, needs_zsh, needs_fish = (
    pytest.mark.skipif(shutil.which(shell) is None, reason=f"needs {shell}") for shell in ("bash", "zsh", "fish")
)


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", "bash"]) == 0
    path = tmp_path / "completion.bash"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    return path


def completed(script: Path, line: str, folder: Path) -> set[str]:
    """What Tab would offer at the end of `line`, asked of bash as readline asks it."""
    words = line.split(" ")
    ask = (
        f"source {script}; COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; "
        f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; "
        "$(complete -p embtune | sed 's/.*-F \\([^ ]*\\).*/\\1/') embtune; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stderr == ""
    return set(done.stdout.split())


@needs_bash
def test_bash_completes_verbs(script: Path, tmp_path: Path) -> None:
    assert completed(script, "embtune ", tmp_path) >= set(CONFIGS)
    assert completed(script, "embtune tr", tmp_path) == {"train"}
    assert completed(script, "embtune e", tmp_path) == {"evaluate", "export"}


@needs_bash
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("embtune train --lora", {"--lora-r", "--lora-alpha", "--lora-args", "--lora-dropout", "--lora-targets"}),
        ("embtune train --engine ", {"auto", "packed", "reference"}),
        ("embtune export --format g", {"gguf"}),
        ("embtune inspect --j", {"--json"}),
        ("embtune train --help-", {"--help-more"}),
        ("embtune train --help-more ", {"data", "evaluation", "model", "run"}),
    ],
)
def test_bash_completes_options_and_their_values(script: Path, line: str, expected: set[str], tmp_path: Path) -> None:
    assert completed(script, line, tmp_path) == expected


@needs_bash
def test_bash_completes_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    assert "pairs.jsonl" in completed(script, "embtune evaluate --data pa", tmp_path)
    # Behind no option there is nothing to offer, and bash's own completion of files comes in.
    assert completed(script, "embtune inspect pa", tmp_path) == set()
    listed = subprocess.run(
        ["bash", "-c", f"source {script}; complete -p embtune"], capture_output=True, text=True, check=True
    )
    assert "-o default" in listed.stdout


# What is typed before Tab -> what stands there, or is offered, after it; pairs.jsonl is in the folder.
TYPED = {
    "embtune tr": "train",
    "embtune train --no-tok": "--no-token-cache",
    "embtune train --engine p": "packed",
    "embtune export --format g": "gguf",
    "embtune train --model pai": "pairs.jsonl",
    "embtune train --data pai": "pairs.jsonl",
    "embtune inspect pai": "pairs.jsonl",
}


def save_script(shell: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    (file.parent / "pairs.jsonl").touch()


class Zsh:
    """An interactive zsh, whose Ctrl-X prints the line as it is."""

    def __init__(self, folder: Path, load: str) -> None:
        self._terminal, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200", "ZDOTDIR": str(folder)}
        self._process = subprocess.Popen(
            ["zsh", "-f", "-i"], stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment
        )
        os.close(slave)
        show = "show() { print -r -- \"<<$BUFFER>>\" }; zle -N show; bindkey '^X' show"
        # The terminal shows what is typed, too: the word that is waited for must not stand in it.
        self._ask(f"{load}; {show}; print rea''dy\n", "ready")

    def completed(self, line: str) -> str:
        answer = self._ask(f"\x15{line}\t\x18", ">>")  # Ctrl-U first: an empty line
        return answer.partition("<<")[2].partition(">>")[0]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

    def _ask(self, typed: str, awaited: str) -> str:
        os.write(self._terminal, typed.encode())
        said = b""
        end = time.monotonic() + 60
        while awaited.encode() not in said:
            assert time.monotonic() < end, said
            if select.select([self._terminal], [], [], 1)[0]:
                said += os.read(self._terminal, 65536)
        return said.decode()


@needs_zsh
@pytest.mark.parametrize(
    "load",
    [
        "fpath=($PWD $fpath); autoload -U compinit; compinit -u -D",
        "autoload -U compinit; compinit -u -D; source ./_embtune",
    ],
    ids=["in fpath", "sourced"],
)
def test_zsh_completes(load: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_script("zsh", tmp_path / "_embtune", capsys)
    zsh = Zsh(tmp_path, load)
    try:
        for typed, expected in TYPED.items():
            assert zsh.completed(typed) == f"{typed.rpartition(' ')[0]} {expected} "
        assert zsh.completed("embtune train --nothing-of-the-kind") == "embtune train --nothing-of-the-kind"
    finally:
        zsh.close()


@needs_fish
def test_fish_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_script("fish", tmp_path / "embtune.fish", capsys)
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    ask = "source embtune.fish; for line in $argv; complete --do-complete $line; echo =; end"
    done = subprocess.run(
        ["fish", "--no-config", "-c", ask, *TYPED],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stderr == ""
    offered = [[row.partition("\t")[0] for row in part.split("\n") if row] for part in done.stdout.split("=\n")[:-1]]
    assert offered == [[expected] for expected in TYPED.values()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell_names_every_verb(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in CONFIGS)
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=script, text=True, check=False).returncode == 0


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "'bash', 'zsh'" in capsys.readouterr().err
