import shutil
import subprocess
from pathlib import Path

import pytest

from embtune.cli.main import CONFIGS, main

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


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
