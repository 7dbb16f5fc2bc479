"""The commands in the README: every script is there and takes these arguments, every file named is there."""
import os
import re
import shlex
import subprocess
import sys

import pytest

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(CHECKOUT, "README.md")) as f:
    README = f.read()


def commands():
    """Command lines of the README's bash blocks, as lists of words; continued lines are joined."""
    out, language = [], None
    for line in README.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            language = None if language else line[3:] or "text"
        elif language == "bash":
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words and words not in out:
                out.append(words)
    return out


def scripts_with_options():
    """{script: options that the README gives it}."""
    found = {}
    for words in commands():
        if words[0] == "python" and words[1].endswith(".py"):
            found.setdefault(words[1], set()).update(w.split("=")[0] for w in words[2:] if w.startswith("-"))
    return found


def test_the_two_commands_come_first():
    first = [words for words in commands() if words[0] == "bash"][:2]
    assert ["bash", "run_demo.bash"] in first and ["bash", "run_tests.bash"] in first


def test_every_stage_has_a_command():
    scripts = scripts_with_options()
    for stage in ("save_features.py", "train_apply_pca.py", "build_graph.py", "logreg.py", "diffusion.py",
                  "test_matmul.py"):
        assert stage in scripts, stage


@pytest.mark.parametrize("script", sorted(scripts_with_options()))
def test_options_are_known_to_the_script(script):
    out = subprocess.run([sys.executable, script, "--help"], cwd=CHECKOUT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", out.stdout[:out.stdout.index("\n\n")] + out.stdout))
    assert scripts_with_options()[script] <= known


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "bash"], ids=" ".join)
def test_bash_scripts_are_there(words):
    assert os.path.exists(os.path.join(CHECKOUT, words[1]))
    if words[1] in ("run_logreg.bash", "run_diffusion.bash"):
        assert words[2] in "1234"


def test_files_named_are_there():
    """Files of the checkout that a command or a link names."""
    named = [w for words in commands() for w in words[1:] if re.fullmatch(r"[\w/]+\.(ya?ml|py|bash|txt)", w)]
    named += [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    for name in named:
        assert any(os.path.exists(os.path.join(CHECKOUT, folder, name)) for folder in ("", "configs")), name


def test_nothing_else_is_called():
    """Every command of the README is one of ours, or a common one."""
    for words in commands():
        assert words[0] in ("python", "bash", "export", "git", "cd", "mkdir", "ln", "cp", "unzip"), words


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "python" and w[1].endswith(".py")], ids=" ".join)
def test_commands_parse(words, tmp_path):
    """Each command gets past its arguments: on an empty data directory it fails for lack of data, in one line."""
    if words[1].startswith(("test_matmul", "benchmarks/", "demo/")):      # these need no data, and take their time
        return
    words = [os.path.expandvars(w.replace("$DDIR", str(tmp_path))) for w in words]
    out = subprocess.run([sys.executable, *words[1:]], cwd=CHECKOUT, capture_output=True, text=True,
                         env={**os.environ, "DDIR": str(tmp_path)}, timeout=60)
    assert out.returncode != 2, out.stderr
    assert "Traceback" not in out.stderr
