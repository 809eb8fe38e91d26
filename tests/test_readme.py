"""What the README names exists: files, functions, tests, flags; and the blocks that it marks as runnable run."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import finetune
import pretrain
import toyset

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
        modules = [importlib.import_module(m) for m in ("model", "detectors", "losses", "views")]
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


TABLE_COMMANDS = re.findall(r"`((?:pre|coco|voc|voc10) [^`]+)`", README)


@pytest.fixture(scope="module")
def functions():
    """The README's shell functions, with torchrun printing its arguments and `last` naming a file."""
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", README, re.S) if "pre()" in block]
    block = block.split("for data in")[0]
    return block + 'torchrun() { printf "%s\\x1f" "$@"; printf "\\x1e"; }\nlast() { echo runs/$1/step-00300000.pt; }\n'


def test_every_row_of_the_papers_tables_has_a_command():
    assert len(TABLE_COMMANDS) == 19 + 23 + 6 + 14 + 8  # Tables 1 to 4, and the poster with VOC and VOC 10 %


def test_commands_of_the_papers_tables_parse(functions):
    """Each pretrains at most once, then fine-tunes what came of it; all flags are accepted."""
    script = functions + "".join(f'{command}\nprintf "\\x1d"\n' for command in TABLE_COMMANDS)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    rows = done.stdout.split("\x1d")[:-1]
    assert len(rows) == len(TABLE_COMMANDS)
    for row in rows:
        calls = [call.split("\x1f")[2:-1] for call in row.split("\x1e")[:-1]]  # without --nproc-per-node 8
        assert [call[0] for call in calls] in (["pretrain.py", "finetune.py"], ["finetune.py"]), row
        tuned = finetune.parse_args(calls[-1][1:])
        if len(calls) == 2:
            args = pretrain.parse_args(calls[0][1:])
            assert tuned.init == f"{args.out}/step-00300000.pt" and args.batch_size % (8 * args.micro_batch) == 0
        else:
            assert tuned.init or tuned.backbone_weights.endswith((".pth", ".tar"))


SMALL = r"""
set -e
python() {  # the README's command, with small sizes after its own
  case "$1" in
    pretrain.py) command "$PY" "$@" --steps 1 --drop-step 1 --batch-size 4 --resolution 64 --device cpu
      for name in runs/caltech-crop runs/caltech-roi; do
        if [ -e $name/step-00000001.pt ]; then cp $name/step-00000001.pt $name/step-00003000.pt; fi
      done ;;
    finetune.py) command "$PY" "$@" --epochs 1 --drop-epoch 1 --resolution 64 --limit 4 --batch-size 4 --device cpu ;;
    *) command "$PY" "$@" ;;
  esac
}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the runnable blocks name: the scripts, DATA, mine, photo.jpg, a pretrained file."""
    here = tmp_path_factory.mktemp("readme")
    for path in ROOT.glob("*.py"):
        (here / path.name).symlink_to(path)
    photos = toyset.write_toy(here / "toy", 12, 4, 4, 96)
    for folder in ("mine", "DATA/cards"):
        shutil.copytree(photos, here / folder)
    shutil.copytree(photos / "unlabelled", here / "DATA/caltech101/images")
    shutil.copy(next((photos / "val").iterdir()), here / "photo.jpg")
    small = (
        "--backbone resnet18 --backbone-weights random --hidden-dim 32 --enc-layers 1 --dec-layers 1 --num-queries 10"
    )
    run(here, f"python pretrain.py --data DATA/caltech101/images {small} --out runs/pre")
    (here / "runs/pre/step-00000001.pt").rename(here / "runs/pre/step-00300000.pt")
    return here


def run(here, script):
    env = {**os.environ, "PY": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", SMALL + script], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


RUNNABLE = re.findall(r"<!-- runnable.*?-->\n```(\w+)\n(.*?)```", README, re.S)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(len(RUNNABLE)), ids=lambda k: RUNNABLE[k][1].split()[1])
def test_runnable_blocks_run(place, k):
    """In the README's order: later ones read what earlier ones wrote."""
    language, block = RUNNABLE[k]
    if "transformers" in block:
        pytest.importorskip("transformers")
    run(place, block if language == "bash" else f"command \"$PY\" - <<'END'\n{block}\nEND\n")


def test_four_blocks_are_runnable():
    assert len(RUNNABLE) == 4
