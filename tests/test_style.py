"""The rules that keep the code readable, as tests: imports go one way, equations are cited, every flag is read."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

import finetune
import pretrain

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("ops/*.py"), *ROOT.glob("bench/*.py")])
OURS = {path.stem for path in ROOT.glob("*.py")} | {"ops"}
MAY_IMPORT = {  # at module level; scripts may import any library file
    **dict.fromkeys("backbone colour data losses metrics plots runtime".split(), set()), "detectors": {"ops"},
    "model": {"backbone", "detectors"}, "formats": {"model"}, "convert": {"formats", "model"},
    "proposals": {"data"}, "toyset": {"data"},
    "views": {"colour", "data", "proposals"}, "clusters": {"convert", "data", "model"},
}  # fmt: skip


BUDGET = {  # lines; a file that outgrows its own loses something first, or this table says in a commit why not
    "backbone": 118, "clusters": 75, "colour": 110, "convert": 485, "data": 550, "detectors": 445, "finetune": 558,
    "formats": 515, "losses": 260, "metrics": 120, "model": 656, "plots": 365, "pretrain": 455, "proposals": 545,
    "runtime": 432, "toyset": 130, "views": 380,
}  # fmt: skip


def imported(tree):
    """Our own modules that a file imports at module level."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & OURS


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_go_one_way(name):
    assert imported(ast.parse((ROOT / f"{name}.py").read_text())) <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", BUDGET)
def test_files_keep_to_their_budget_of_lines(name):
    assert set(BUDGET) == OURS - {"ops"}
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= BUDGET[name]


def prose(path):
    """Of a file's lines that are not empty: shares that carry a docstring or a comment, and that hold nothing else."""
    lines = path.read_text().splitlines()
    filled = {i for i, line in enumerate(lines, 1) if line.strip()}
    tree = ast.parse("\n".join(lines))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    texts = [node.body[0] for node in nodes if ast.get_docstring(node)]
    alone = {i for text in texts for i in range(text.lineno, text.end_lineno + 1)} & filled
    with open(path, "rb") as file:
        comments = [t for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT]
    comments = [t for t in comments if not t.string.startswith("# fmt:")]  # that one tells ruff, not a reader
    alone |= {t.start[0] for t in comments if t.line.strip().startswith("#")}
    return len(alone | {t.start[0] for t in comments}) / len(filled), len(alone) / len(filled)


EXPLAINED = [*(ROOT / f"{name}.py" for name in BUDGET), ROOT / "ops" / "build.py", ROOT / "ops" / "deform_attn.py"]


@pytest.mark.parametrize("path", EXPLAINED, ids=lambda path: path.name)
def test_prose_is_15_to_30_percent(path):
    """Too little hides the why and too much drowns the code: at least 15 % of the lines say something beside code, or
    instead of it, and at most 30 % say nothing but prose. A comment behind code, a shape mostly, costs no line."""
    explained, alone = prose(path)
    assert 0.15 <= explained and alone <= 0.30, f"{explained:.3f} explained, {alone:.3f} prose alone"


def test_prose_counts_docstrings_and_comments(tmp_path):
    file = tmp_path / "some.py"
    file.write_text('"""One\n\ntwo."""\n# three\nx = 1  # four\ny = "# no"  # fmt: skip\n\nz = """no\n"""\n')
    assert prose(file) == (4 / 7, 3 / 7)


def test_scripts_do_not_import_each_other():
    scripts = {"pretrain", "finetune"}
    for path in FILES:
        if path.parent == ROOT:
            assert not imported(ast.parse(path.read_text())) & (scripts - {path.stem}), path.name


@pytest.mark.parametrize("number", range(1, 14))
def test_every_equation_is_cited_where_it_is_computed(number):
    text = "".join((ROOT / name).read_text() for name in ("model.py", "detectors.py", "losses.py"))
    cited = {n for a, b in re.findall(r"Eq\. \((\d+)\)(?:-\((\d+)\))?", text) for n in range(int(a), int(b or a) + 1)}
    assert number in cited | {int(n) for n in re.findall(r"Eq\. \(?[\d, ()-]*?(\d+)\)", text)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_left_over_and_nothing_unpickles(path):
    text = path.read_text()
    text.encode("ascii")
    assert ast.get_docstring(ast.parse(text)) or path.name == "__init__.py"
    for node in ast.walk(ast.parse(text)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "bare except"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in ("eval", "exec") and not name.startswith("pickle."), name
            assert name != "torch.load" or flags.get("weights_only") == "True"
            assert flags.get("allow_pickle", "False") == "False" and not name.endswith(".cuda")
    assert not re.search(r"TODO|FIXME|XXX", text)


@pytest.mark.parametrize("script", [pretrain, finetune], ids=lambda script: script.__name__)
def test_every_flag_is_read_and_there_are_at_most_46(script):
    text = (ROOT / f"{script.__name__}.py").read_text()
    flags = re.findall(r'(?:add|add_argument)\(\s*"--([a-z0-9-]+)"', text)
    assert 20 < len(flags) <= 46 and len(set(flags)) == len(flags)
    outside = [node for node in ast.parse(text).body if getattr(node, "name", "") != "parse_args"]
    read = set()  # attributes and words of constants anywhere but in the parser
    for node in (inner for outer in outside for inner in ast.walk(outer)):
        if isinstance(node, ast.Attribute):
            read.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            read.update(node.value.split())
    assert [flag for flag in flags if flag.replace("-", "_") not in read] == []


FLAGS = {  # frozen: a new one is a change here, in --help and in the README; one that changes meaning gets a new name
    "pretrain": """amp augment-on backbone backbone-weights batch-size box-refine centre-features clip compat compile
        data dec-layers decoder-consistency device drop-step dropout enc-layers hidden-dim init keep-every
        limit log-every lr match method micro-batch no-global num-queries num-regions out pre-norm proposals
        pseudo-classes recipe region-nms region-stride region-target resolution save-every seed steps stride
        tau variant weight-decay workers""",
    "finetune": """amp backbone backbone-weights batch-size box-refine clip dec-layers device difficult drop-epoch
        dropout enc-layers epochs eval-every eval-only export-proposals fraction fraction-seed hidden-dim
        init keep-every limit log-every lr lr-backbone metric micro-batch num-queries out overfit pre-norm
        predict recipe resolution save-every save-json seed stride threshold train val variant weight-decay
        workers""",
}


@pytest.mark.parametrize("script", FLAGS)
def test_flags_are_frozen(script):
    text = (ROOT / f"{script}.py").read_text()
    assert sorted(re.findall(r'(?:add|add_argument)\(\s*"--([a-z0-9-]+)"', text)) == FLAGS[script].split()


@pytest.mark.parametrize("name", ["model", "backbone", "detectors", "losses", "views", "colour", "ops/deform_attn"])
def test_shapes_use_the_letters_of_the_readme(name):
    """A shape is a list in brackets such as (V*B, R, 4); each of its letters stands in the README's table."""
    table = re.search(r"Shapes: (.*?)\n\n", (ROOT / "README.md").read_text(), re.S)[1]
    letters = set(re.findall(r"\b([A-Z]0?)\b", table))
    shapes = re.findall(r"\(((?:[A-Z0-9*+/ .]+,)+[A-Z0-9*+/ .|]*)\)", (ROOT / f"{name}.py").read_text())
    used = {letter for shape in shapes for letter in re.findall(r"[A-Z]0?", shape)}
    assert shapes and used <= letters, used - letters
