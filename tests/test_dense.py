"""ops.linear is F.linear up to rounding, by oneDNN where that is faster."""

import pytest
import torch
import torch.nn.functional as F

from ops import Linear, dense, linear


def products(f, x, weight, bias):
    """-> y and the gradients of x, weight and bias."""
    tensors = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = f(*tensors)
    g = torch.Generator().manual_seed(1)
    return [y, *torch.autograd.grad(y, tensors, torch.randn(y.shape, generator=g).to(y))]


SHAPES = {"queries": ((2, 100, 256), 256), "six layers": ((6, 2, 100, 256), 91), "wide": ((320, 128), 512),
          "narrow": ((4000, 8), 32), "one row": ((1, 65536), 32)}  # fmt: skip


@pytest.mark.parametrize("shape, outputs", SHAPES.values(), ids=SHAPES)
def test_linear_and_its_gradients_are_as_exact_as_torchs(shape, outputs, monkeypatch):
    """But the bias's, whose rows oneDNN adds one after the other: half of float32's last digit for each."""
    monkeypatch.setattr(dense, "INSTEAD_OF_MKL", dense.CHOICE)
    g = torch.Generator().manual_seed(0)
    x, bias = torch.randn(shape, generator=g), torch.randn(outputs, generator=g)
    weight = torch.randn(2 * outputs, shape[-1], generator=g).chunk(2)[1]  # as Attention's share of in_proj_weight
    exact = products(F.linear, x.double(), weight.double(), bias.double())
    ours, torchs = products(linear, x, weight, bias), products(F.linear, x, weight, bias)
    for i, true in enumerate(exact):
        assert ours[i].shape == true.shape and ours[i].is_contiguous()
        error, allowed = ((t[i] - true).abs().max() for t in (ours, torchs))
        rows = x[..., 0].numel() if i == 3 else 3
        assert error <= 3 * allowed + rows * 2**-24 * true.abs().max()


def test_linear_takes_views_no_rows_no_bias_and_any_precision(monkeypatch):
    monkeypatch.setattr(dense, "INSTEAD_OF_MKL", dense.CHOICE)
    x, weight = torch.randn(64, 30, 128).transpose(0, 1), torch.randn(64, 128)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-4, rtol=1e-4)
    assert linear(x[:0], weight).shape == (0, 64, 64)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(linear(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MAKERS = [("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX512", True), (None, "AVX512", True),
          ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX2", False), (None, "DEFAULT", False)]  # fmt: skip


@pytest.mark.parametrize("maker, instructions, expected", MAKERS)
def test_mkl_stays_on_intels_processors_and_without_avx512(maker, instructions, expected, tmp_path, monkeypatch):
    """There a step takes longer with oneDNN's products than with MKL's (README, Speed)."""
    monkeypatch.setattr("platform.processor", lambda: "x86_64")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: instructions)
    if maker:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    assert dense.onednn_is_faster(tmp_path / "cpuinfo") == expected


def test_the_choice_is_this_processors():
    assert dense.INSTEAD_OF_MKL == (dense.CHOICE and dense.onednn_is_faster())


@pytest.mark.skipif(not dense.CHOICE, reason="this torch has no MKL or no oneDNN")
@pytest.mark.parametrize("rows, convolutions", [(160, 0), (161, 1)])  # 128 numbers each: 20480 is the limit
def test_linear_is_onednns_in_one_thread_from_the_size_on_where_torch_allows_it(
    rows, convolutions, one_thread, monkeypatch
):
    """Below that size, and without the dilation, a convolution would be several times slower than F.linear."""
    monkeypatch.setattr(dense, "INSTEAD_OF_MKL", True)
    x, weight = torch.randn(rows, 128), torch.randn(64, 128)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        linear(x, weight)
    names = [event.name for event in seen.events()]
    assert names.count("aten::mkldnn_convolution") == convolutions
    assert ("aten::addmm" in names or "aten::mm" in names) == (not convolutions)
    assert not [name for name in names if "slow_conv" in name]


def test_linear_is_plain_in_an_exported_graph(monkeypatch):
    monkeypatch.setattr(dense, "INSTEAD_OF_MKL", dense.CHOICE)
    program = torch.export.export(Linear(256, 64), (torch.randn(200, 256),))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.linear.default"]
