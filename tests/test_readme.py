"""What the README names exists: files, functions, tests, flags."""

import importlib
import re
from pathlib import Path

import pytest

import finetune
import pretrain

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_relative_links_and_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links and all((ROOT / link).exists() for link in links)
    files = set(re.findall(r"`(\w+\.py)`", README))
    assert [name for name in files if not (ROOT / name).exists() and not (ROOT / "tests" / name).exists()] == []


def test_named_tests_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", README)
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test


@pytest.mark.parametrize("row", [line for line in README.splitlines() if re.match(r"\| \(\d", line)])
def test_functions_of_the_equation_table_exist(row):
    for name in re.findall(r"`([\w.]+)`", row.split("|")[2]):
        head, *rest = name.split(".")
        modules = [importlib.import_module(m) for m in ("model", "detectors", "losses")]
        found = [getattr(m, head) for m in modules if hasattr(m, head)]
        found = found or [importlib.import_module(head)]
        if rest and rest != ["f_sem"]:  # an attribute that __init__ makes
            assert hasattr(found[0], rest[0]), name


def test_commands_use_flags_that_exist(capsys):
    helps = {}
    for module in (pretrain, finetune):
        with pytest.raises(SystemExit):
            module.main(["--help"])
        helps[module.__name__] = capsys.readouterr().out
    commands = [line.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", README, re.S)
                for line in re.split(r"(?<!\\)\n", block)]  # fmt: skip
    checked = 0
    for command in commands:
        for name, text in helps.items():
            if f"{name}.py" in command:
                flags = re.findall(r"(--[a-z][a-z-]*)", command.split(f"{name}.py", 1)[1])
                assert all(flag in text for flag in flags), command
                checked += len(flags)
    assert checked > 20
