"""deform_attn equals a loop written from its formula, whichever kernel runs, and runs where no kernel can be built."""

import ctypes
import importlib
import mmap
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD

from ops import build, deform_attn
from ops.deform_attn import backward_op, call, forward_op, kernel, reference, run_forward

op = importlib.import_module("ops.deform_attn")  # the name in `ops` is the function's
ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on the PATH")
KERNELS = [
    "reference",
    pytest.param("cpu", marks=needs_compiler),
    pytest.param("shim", marks=needs_compiler),  # cuda.cu on the CPU
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DIFFERENTIABLE = [KERNELS[0], KERNELS[1], KERNELS[3]]
LEVELS = [(5, 7), (3, 4), (1, 1), (1, 6), (4, 1), (2, 2), (3, 3), (6, 1)]
# B, N, M, D, levels, P: no two of a row alike where they could be mixed up
CASES = {
    "usual": (2, 5, 3, 32, 4, 4),
    "one of each": (1, 1, 1, 1, 1, 1),
    "three channels": (2, 4, 1, 3, 2, 5),
    "odd channels": (1, 3, 2, 17, 3, 4),
    "nearly a vector": (2, 3, 1, 30, 1, 2),
    "64 channels": (1, 2, 3, 64, 2, 3),
    "71 channels": (2, 1, 3, 71, 2, 1),
    "256 channels": (1, 3, 2, 256, 2, 2),
    "1025 channels": (1, 2, 1, 1025, 2, 3),
    "8 levels, 16 points": (1, 2, 1, 4, 8, 16),
    "more points than cells": (2, 40, 3, 8, 2, 3),
    "many queries, odd channels": (1, 40, 2, 19, 3, 2),
    "no query": (2, 0, 3, 8, 2, 4),
    "no image": (0, 3, 2, 8, 2, 4),
}


def example(B, N, M, D, G, P, dtype=torch.float64, seed=0):
    """Random tensors; points lie up to three cells outside and at least 0.01 cells from where derivatives jump."""
    g = torch.Generator().manual_seed(seed)
    shapes = LEVELS[:G]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    size = torch.tensor(shapes).flip(-1)[:, None]  # (G, 1, 2)
    cell = torch.stack([torch.randint(-3, w + 3, (B, N, M, P, 2), generator=g) for h, w in shapes], 3)
    cell[..., 1] = torch.stack([torch.randint(-3, h + 3, (B, N, M, P), generator=g) for h, w in shapes], 3)
    fraction = 0.01 + 0.98 * torch.rand(B, N, M, G, P, 2, generator=g, dtype=torch.float64)
    value = torch.randn(B, sum(h * w for h, w in shapes), M, D, generator=g, dtype=torch.float64)
    weights = torch.rand(B, N, M, G, P, generator=g, dtype=torch.float64)
    grad = torch.randn(B, N, M * D, generator=g, dtype=torch.float64)
    locations = (cell + fraction + 0.5) / size
    return value.to(dtype), shapes, locations.to(sums), weights.to(sums), grad.to(dtype)


def loop(value, shapes, locations, weights, grad):
    """The formula, point by point and corner by corner, in float64: the output and the three gradients."""
    value, locations, weights = (t.double().requires_grad_() for t in (value, locations, weights))
    B, N, M, G, P, _ = locations.shape
    rows = []
    for b in range(B):
        for n in range(N):
            for m in range(M):
                row, start = torch.zeros(value.shape[-1], dtype=torch.float64), 0
                for g, (H, W) in enumerate(shapes):
                    for p in range(P):
                        if not locations[b, n, m, g, p].isfinite().all():
                            continue
                        x = locations[b, n, m, g, p, 0] * W - 0.5
                        y = locations[b, n, m, g, p, 1] * H - 0.5
                        x0, y0 = int(x.floor()), int(y.floor())
                        for j in (y0, y0 + 1):
                            for i in (x0, x0 + 1):
                                if 0 <= i < W and 0 <= j < H:
                                    share = (1 - (x - i).abs()) * (1 - (y - j).abs())
                                    row = row + weights[b, n, m, g, p] * share * value[b, start + j * W + i, m]
                    start += H * W
                rows.append(row)
    D = value.shape[-1]
    out = torch.cat([*rows, torch.zeros(0)]).view(B, N, M * D) + 0 * value.sum()  # so that there is always a graph
    grads = torch.autograd.grad(out, [value, locations, weights], grad.double(), materialize_grads=True)
    return out.detach(), *grads


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """cuda.cu with warp.h in place of the device."""
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    source = ["-x", "c++", "-include", str(ROOT / "tests" / "warp.h"), str(ROOT / "ops" / "cuda.cu")]
    subprocess.run([COMPILER, *flags, *source, "-o", str(path)], check=True)
    return build.bound(build.ctypes.CDLL(str(path)))


@pytest.fixture
def run(request, monkeypatch):
    """run(name, value, shapes, locations, weights, grad): the output and the three gradients of one implementation."""

    def run(name, value, shapes, locations, weights, grad):
        if name == "shim":
            library, flat = request.getfixturevalue("shim"), [x for pair in shapes for x in pair]
            sums = torch.zeros(value.shape, dtype=locations.dtype)
            rest = [torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (locations, weights)]
            arrays = [t.contiguous() for t in (grad, value, locations, weights)]
            call(library, "deform_attn_backward", value, flat, locations.shape, [*arrays, sums, *rest])
            return run_forward(library, value, flat, locations, weights), sums.to(value.dtype), *rest
        monkeypatch.setenv("SIAMESE_DETR_OPS", name)
        device = "cuda" if name == "cuda" else "cpu"
        inputs = [t.detach().to(device).requires_grad_() for t in (value, locations, weights)]
        out = deform_attn(inputs[0], shapes, *inputs[1:])
        return tuple(t.detach().cpu() for t in (out, *torch.autograd.grad(out, inputs, grad.to(device))))

    return run


def close(ours, right, tolerance, rounding=0.0):
    """Errors relative to the largest entry; rounding: of each entry itself, where the result is stored coarsely."""
    for name, a, b in zip(("out", "value", "locations", "weights"), ours, right, strict=True):
        if not b.numel():
            assert a.shape == b.shape
            continue
        coarse = rounding * b.abs() if name in ("out", "value") else 0
        excess = ((a.double() - b).abs() - coarse).max() / b.abs().max().clamp(min=1e-30)
        assert excess <= tolerance, f"{name}: {excess:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Same numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_loop(run, name, case):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        tensors = example(*CASES[case], dtype=dtype)
        close(run(name, *tensors), loop(*tensors), tolerance)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", ["usual", "three channels", "64 channels", "71 channels", "more points than cells"])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_summed_in_float32(run, name, case, dtype, rounding):
    """Only what is stored in half precision is rounded, once; location and weight gradients are not."""
    tensors = example(*CASES[case], dtype=dtype)
    ours = run(name, *tensors)
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, torch.float32]
    close(ours, loop(*tensors), 1e-5, rounding)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", ["usual", "more points than cells"])
def test_point_that_is_not_finite_or_far_outside_counts_as_zero(run, name, case):
    value, shapes, locations, weights, grad = example(*CASES[case], dtype=torch.float32)
    far = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 3e9, -3e9, 1e-45])
    g = torch.Generator().manual_seed(1)
    chosen = torch.rand(locations.shape, generator=g) < 0.3
    locations = torch.where(chosen, far[torch.randint(8, locations.shape, generator=g)], locations)
    ours = run(name, value, shapes, locations, weights, grad)
    assert all(t.isfinite().all() for t in ours)
    close(ours, loop(value, shapes, locations, weights, grad), 1e-5)
    gone = ~locations.isfinite().all(-1)
    assert (ours[2][gone] == 0).all() and (ours[3][gone] == 0).all() and gone.any()


@pytest.mark.parametrize("name", KERNELS[:3])  # compute-sanitizer is the tool for the device
@pytest.mark.parametrize("case", ["usual", "more points than cells"])
def test_nothing_outside_the_arrays_is_read_or_written(run, name, case):
    """Every array lies between NaNs, and infinite cells that no point touches leave no trace."""
    *tensors, grad = example(*CASES[case], dtype=torch.float32)

    def fenced(t):
        around = torch.full((t.numel() + 512,), torch.nan)
        around[256:-256] = t.flatten()
        return around[256:-256].view(t.shape)

    value, shapes, locations, weights = tensors
    right = loop(*tensors, grad)
    touched = right[1].abs().sum(-1, keepdim=True) > 0
    value = torch.where(touched, value, torch.inf)
    close(run(name, fenced(value), shapes, fenced(locations), fenced(weights), fenced(grad)), right, 1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_inputs_need_not_be_contiguous(run, name):
    tensors = example(*CASES["usual"], dtype=torch.float32)
    strided = [t if isinstance(t, list) else t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    assert not strided[0].is_contiguous()
    for a, b in zip(run(name, *strided), run(name, *tensors), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_inputs_may_need_no_gradient(monkeypatch, name, needed):
    monkeypatch.setenv("SIAMESE_DETR_OPS", name)
    value, shapes, locations, weights, grad = example(*CASES["usual"])
    device = "cuda" if name == "cuda" else "cpu"
    inputs = [t.to(device).requires_grad_(need) for t, need in zip((value, locations, weights), needed, strict=True)]
    deform_attn(inputs[0], shapes, *inputs[1:]).backward(grad.to(device))
    right = loop(value, shapes, locations, weights, grad)[1:]
    for t, need, expected in zip(inputs, needed, right, strict=True):
        assert (t.grad is not None) == need and (not need or torch.allclose(t.grad.cpu(), expected))


@pytest.mark.parametrize("name", KERNELS[1:3])
def test_values_past_two_to_the_31_elements_are_found(request, name):
    """A map of 8.9 GB of which only touched pages exist: the index arithmetic is 64 bits wide."""
    side, M, D = 2950, 8, 32
    memory = mmap.mmap(-1, side * side * M * D * 4, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    value = torch.frombuffer(memory, dtype=torch.float32).view(1, side * side, M, D)
    column = side // 2
    cell = side * (side - 1) + column  # in the last row
    assert cell * M * D > 2**31
    value[0, cell, 7], value[0, cell + 1, 7] = torch.arange(32.0), 100
    locations = torch.full((1, 1, M, 1, 1, 2), (side - 0.5) / side)
    locations[..., 0] = (column + 0.75) / side
    library = request.getfixturevalue("shim") if name == "shim" else kernel("cpu")
    out = run_forward(library, value, [side, side], locations, torch.ones(1, 1, M, 1, 1))
    assert torch.allclose(out[0, 0, -32:], 0.75 * torch.arange(32.0) + 25, atol=0.1)  # a location has 24 bits
    assert out[0, 0, :-32].abs().max() == 0


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(monkeypatch, name):
    monkeypatch.setenv("SIAMESE_DETR_OPS", name)
    value, shapes, locations, weights, _ = example(1, 2, 2, 3, 2, 2)
    device = "cuda" if name == "cuda" else "cpu"
    inputs = [t.to(device).requires_grad_() for t in (value, locations, weights)]
    torch.autograd.gradcheck(
        lambda v, x, w: deform_attn(v, shapes, x, w), inputs, nondet_tol=1e-12 if name == "cuda" else 0.0
    )


@needs_compiler
def test_bits_do_not_depend_on_the_number_of_threads(run):
    """Resuming a run bit by bit needs this: every sum has one order."""
    results = []
    for case in ("usual", "more points than cells"):
        threads = torch.get_num_threads()
        try:
            for n in (1, 1, 2, 5):
                torch.set_num_threads(n)
                results.append(run("cpu", *example(*CASES[case], dtype=torch.float32)))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        results.clear()


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_compiler)])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda v, s, x, w: (v, s[:-1], x, w), "do not describe value"),
        (lambda v, s, x, w: (v, [*s[:-1], (0, 5)], x, w), "do not describe value"),
        (lambda v, s, x, w: (v[0], s, x, w), "do not describe value"),
        (lambda v, s, x, w: (v, s, x[:1], w), "do not fit value"),
        (lambda v, s, x, w: (v, s, x.flatten(), w), "do not fit value"),
        (lambda v, s, x, w: (v, s, x, w.to("meta")), "weights on meta"),
        (lambda v, s, x, w: (v, s, x, w[..., :1]), "do not fit value"),
        (lambda v, s, x, w: (v, s, x[:, :, :, :1], w[:, :, :, :1]), "do not fit value"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(monkeypatch, name, change, match):
    monkeypatch.setenv("SIAMESE_DETR_OPS", name)
    with pytest.raises(ValueError, match=match):
        deform_attn(*change(*example(*CASES["usual"])[:4]))


# ---------------------------------------------------------------------------------------------------------------------
# The operator in PyTorch
# ---------------------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operator_is_registered_properly(dtype):
    value, shapes, locations, weights, grad = example(*CASES["three channels"], dtype=dtype)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    flat = [x for pair in shapes for x in pair]
    torch.library.opcheck(forward_op, (inputs[0], flat, *inputs[1:]), rtol=1e-4, atol=1e-4)
    plain = [t.detach() for t in inputs]
    for wanted in (True, False):
        torch.library.opcheck(backward_op, (grad, plain[0], flat, *plain[1:], wanted))


@needs_compiler
@pytest.mark.parametrize("autocast", [False, True])
def test_deformable_encoder_layer_compiles_without_a_graph_break(autocast):
    from detectors import Context, EncoderLayer
    from model import VARIANTS

    torch.manual_seed(0)
    layer = EncoderLayer(VARIANTS["deformable-ms"], 32, 8, False).eval()
    shapes = [(6, 8), (3, 4), (2, 2), (1, 1)]
    c, pos = torch.randn(2, 2, 65, 32).unbind(0)
    ctx = Context(c, pos, torch.zeros(2, 65, dtype=torch.bool), shapes, torch.ones(2, 4, 2))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, expected = compiled(c, pos, ctx), layer(c, pos, ctx)
    assert torch.allclose(out, expected, atol=1e-5)
    towards = torch.randn(out.shape)  # squares of what leaves a layer norm have no gradient but rounding
    grads = [torch.autograd.grad((x.float() * towards).sum(), list(layer.parameters())) for x in (out, expected)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max().clamp(min=1e-6))


@needs_compiler
def test_operator_exports():
    class Net(torch.nn.Module):
        def forward(self, value, locations, weights):
            return deform_attn(value, shapes, locations, weights)

    value, shapes, locations, weights, _ = example(*CASES["usual"], dtype=torch.float32)
    program = torch.export.export(Net(), (value, locations, weights))
    assert "siamese_detr.deform_attn" in program.graph_module.code
    assert torch.equal(program.module()(value, locations, weights), deform_attn(value, shapes, locations, weights))


def test_function_transforms_use_the_reference():
    value, shapes, locations, weights, grad = example(*CASES["usual"])
    by_value = torch.func.grad(lambda v: (deform_attn(v, shapes, locations, weights) * grad).sum())(value)
    assert torch.allclose(by_value, loop(value, shapes, locations, weights, grad)[1])


def test_forward_mode_gets_no_derivative_of_zero():
    """A kernel knows no tangents; the reference raises what grid_sample does."""
    value, shapes, locations, weights, _ = example(*CASES["usual"])
    with fwAD.dual_level(), pytest.raises(NotImplementedError, match="forward AD"):
        deform_attn(fwAD.make_dual(value, value), shapes, locations, weights)


FIRST_CALLS = {  # whatever the caller is in, the kernel is tried outside of it
    "inference": "with torch.inference_mode(): deform_attn(*args)",
    "grad": "torch.func.grad(lambda v: deform_attn(v, *args[1:]).sum())(args[0])",
    "vmap": "torch.func.vmap(lambda v: deform_attn(v, *args[1:]))(args[0][None])",
    "fake": "from torch._subclasses import FakeTensorMode\n"
            "with FakeTensorMode() as m: deform_attn(*(a if isinstance(a, list) else m.from_tensor(a) for a in args))",
    "device": "torch.set_default_device('meta'); deform_attn(*args)",
}  # fmt: skip


@pytest.mark.parametrize("call", FIRST_CALLS)
def test_kernel_is_found_whichever_mode_the_first_call_is_in(call):
    if op.find_kernel("cpu")[0] is None:
        pytest.skip("no compiled kernel on this machine")
    program = "import torch; from ops import deform_attn; from ops.deform_attn import kernel\n"
    program += "args = torch.randn(1, 6, 1, 4), [(2, 3)], torch.rand(1, 5, 1, 1, 2, 2), torch.rand(1, 5, 1, 1, 2)\n"
    program += f"{FIRST_CALLS[call]}\nassert kernel('cpu') is not None"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-500:]}"


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing built yet, nothing remembered, and the build folder empty."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("SIAMESE_DETR_OPS", raising=False)
    op.find_kernel.cache_clear()
    yield monkeypatch
    op.find_kernel.cache_clear()


def no_compiler(patch, tmp_path):
    patch.setenv("PATH", str(tmp_path))


def failing_compiler(patch, tmp_path):
    patch.setenv("CXX", shutil.which("false"))


def unwritable_home(patch, tmp_path):
    (tmp_path / "file").touch()
    patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))  # even root cannot make a folder in a file


def wrong_kernel(patch, tmp_path):
    patch.setattr(build, "load", lambda device: None)
    patch.setattr(op, "self_test", lambda library, device: {torch.float32: float("nan")})


def kernel_that_does_not_run(patch, tmp_path):
    def fail(library, device):
        raise RuntimeError("CUDA driver version is insufficient")

    patch.setattr(build, "load", lambda device: None)
    patch.setattr(op, "self_test", fail)


def library_without_its_functions(patch, tmp_path):
    patch.setattr(build, "load", lambda device: build.bound(ctypes.CDLL(None)))


@pytest.mark.parametrize(
    ("obstacle", "why"),
    [
        (no_compiler, r"no C\+\+ compiler \(c\+\+ or g\+\+ or clang\+\+\) on the PATH"),
        (failing_compiler, r"false .* failed: exit status 1"),
        (unwritable_home, "cannot be written or loaded .*Not a directory.*set TORCH_EXTENSIONS_DIR"),
        (wrong_kernel, "wrong on this machine"),
        (kernel_that_does_not_run, "does not run here .CUDA driver version is insufficient"),
        (library_without_its_functions, "does not run here .*undefined symbol"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_without_a_kernel_the_reference_runs_after_one_warning(fresh, tmp_path, obstacle, why):
    obstacle(fresh, tmp_path)
    tensors = example(*CASES["usual"])[:4]
    with pytest.warns(RuntimeWarning, match=f"no cpu kernel, the slower PyTorch reference is used: .*{why}") as seen:
        out = [deform_attn(*tensors) for _ in range(3)]
    assert len([w for w in seen if issubclass(w.category, RuntimeWarning)]) == 1
    assert torch.equal(out[0], reference(*tensors)) and torch.equal(out[0], out[2])
    fresh.setenv("SIAMESE_DETR_OPS", "cpu")
    with pytest.raises(ValueError, match=f"SIAMESE_DETR_OPS=cpu: .*{why}"):
        deform_attn(*tensors)


def test_setting_chooses_the_kernel(fresh):
    tensors = example(*CASES["usual"])[:4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in ("reference", "cuda"):  # the CUDA kernel serves CUDA tensors only
            fresh.setenv("SIAMESE_DETR_OPS", mode)
            assert torch.equal(deform_attn(*tensors), reference(*tensors))
    fresh.setenv("SIAMESE_DETR_OPS", "gpu")
    with pytest.raises(ValueError, match="SIAMESE_DETR_OPS=gpu: expected one of auto, cpu, cuda, reference"):
        deform_attn(*tensors)


def test_cuda_kernel_says_what_it_lacks(fresh, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(build.BuildError, match="no CUDA device is visible"):
            build.load("cuda")
    fresh.setenv("PATH", str(tmp_path))
    fresh.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="no nvcc in CUDA_HOME or on the PATH"):
        build.cuda_command(["90"])


@needs_compiler
def test_build_is_announced_once_and_reused(fresh, capfd):
    for _ in range(2):
        build.load("cpu")
    assert capfd.readouterr().err.count("ops: compiling cpu.cpp for this machine, once, into") == 1
    built = list(build.cache().glob("*.so"))
    assert len(built) == 1
    fresh.setattr(build, "abilities", lambda: "another processor")
    assert build.fingerprint(build.cpu_commands()) not in built[0].name


@needs_compiler
@pytest.mark.slow
def test_two_processes_build_at_once(fresh):
    code = "import torch; from ops.deform_attn import kernel; assert kernel('cpu') is not None"
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(errors).count("ops: compiling") == 1
    assert sorted(path.suffix for path in build.cache().iterdir()) == [".lock", ".so"]


@needs_compiler
@pytest.mark.slow
def test_command_reports_builds_and_errors():
    done = subprocess.run([sys.executable, "-m", "ops"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "cpu: ok" in done.stdout and "ns per point" in done.stdout and "cuda:" in done.stdout


def nvcc():
    try:
        return build.cuda_command(["80", "90+PTX"])
    except build.BuildError:
        return None


@pytest.mark.slow
@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_cuda_source_compiles_without_warnings_and_loads(tmp_path):
    command = [*nvcc(), "-Werror", "all-warnings", str(ROOT / "ops" / "cuda.cu"), "-o", str(tmp_path / "cuda.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    build.bound(build.ctypes.CDLL(str(tmp_path / "cuda.so")))


@pytest.mark.gpu
@pytest.mark.parametrize("D", [1, 17, 32, 64, 256])
def test_cuda_kernel_builds_and_agrees(D):
    errors = op.self_test(kernel("cuda"), "cuda", D)
    assert len(errors) == 4 and all(error <= op.LIMITS[dtype] for dtype, error in errors.items())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-mno-avx512f"], ["-mno-avx"]] if platform.machine() == "x86_64" else [[]])
def test_every_vector_width_agrees_and_compiles_without_warnings(tmp_path, flags):
    """What other processors would run, with the flags of the last resort too."""
    for attempt in build.cpu_commands() if not flags else build.cpu_commands()[:1]:
        path = tmp_path / f"{len(attempt)}.so"
        source = str(ROOT / "ops" / "cpu.cpp")
        subprocess.run([*attempt, "-Wall", "-Wextra", "-Werror", *flags, source, "-o", str(path)], check=True)
        library = build.bound(build.ctypes.CDLL(str(path)))
        for D in (1, 17, 32, 64, 71):
            assert all(error <= op.LIMITS[dtype] for dtype, error in op.self_test(library, "cpu", D).items())
