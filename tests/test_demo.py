"""The README's first command, small: every step runs and every product is there."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import demo, fidelity
from bench.demo import table


def test_table_lists_both_arms_at_common_epochs():
    points = {"from scratch": [{"epoch": 2, "AP": 0.1, "AP50": 0.2}, {"epoch": 4, "AP": 0.2, "AP50": 0.3}]}
    points["pretrained"] = [{"epoch": 2, "AP": 0.3, "AP50": 0.45}]
    assert table(points).splitlines()[-1].split() == ["2", "20.0", "10.0", "45.0", "30.0"]


def test_fidelity_compares_two_runs_that_differ_in_amp_alone(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(demo, "run", lambda *words: commands.append([str(word) for word in words]))
    monkeypatch.setattr(fidelity.plots, "save_curves", lambda *_: None)
    monkeypatch.setattr(fidelity.plots, "read_log", lambda _: [{"step": 10, **dict.fromkeys(fidelity.TERMS, 1.0)}])
    assert fidelity.curves(["--data", "x"], 10, tmp_path)["float32"]["loss"] == 1
    plain, half = (" ".join(words).replace("float32", "bfloat16") for words in commands)
    assert half.replace(" --amp", "") == plain != half


def test_demo_ends_the_other_fine_tuning_when_one_fails(tmp_path, monkeypatch):
    """Else it would go on writing beside the one that the same command starts."""
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "step-00000001.pt").touch()
    codes, children = iter(["import sys; sys.exit(2)", "import time; time.sleep(60)"]), []

    def start(*words):
        children.append(subprocess.Popen([sys.executable, "-c", next(codes), words[0]]))
        return children[-1]

    monkeypatch.setattr(demo, "run", lambda *words: None)
    monkeypatch.setattr(demo, "start", start)
    with pytest.raises(SystemExit, match="finetune.py failed with exit code 2"):
        demo.main(["--out", str(tmp_path)])
    assert children[1].poll() == -signal.SIGTERM


@pytest.mark.slow
def test_quick_demo_ends_with_its_table_and_pictures(tmp_path):
    command = [sys.executable, "-m", "bench.demo", "--quick", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "from scratch" in done.stdout and "demo: " in done.stdout.splitlines()[-1]
    names = {path.name for path in (tmp_path / "demo").glob("*.png")}
    assert names == {"views.png", "proposals.png", "pretrain.png", "finetune.png", "ap.png"}
    assert len(list((tmp_path / "demo" / "detections").glob("*.png"))) == 6
