"""The ledger: how many launches, bytes and FLOPs a step costs, ours and diffusers', counted without a device."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ddim_fast import UNet2DModel
from ddim_fast.engine.convs import padded_weight
from ddim_fast.engine.forward import fused_forward, time_table
from ddim_fast.engine.pack import pack
from ddim_fast.kernels import launch
from ddim_fast.kernels.group_norm import group_norm

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def modules():
    """The benchmark modules (ledger, counting, roofline)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return tuple(importlib.import_module(name) for name in ("ledger", "counting", "roofline"))


@pytest.fixture(scope="module")
def counted(modules):
    """(ours, diffusers') of the models that the bounds are about, in float16."""
    ledger = modules[0]
    return {
        model: tuple(ledger.ledgers(model, batch, torch.float16, "diffusers").values())
        for model, batch in (("cifar10", 64), ("lsun", 8), ("digits", 64))
    }


@pytest.mark.parametrize(("model", "launches"), [("cifar10", 200), ("lsun", 280), ("digits", 110)])
def test_a_step_keeps_to_its_bounds(counted, model, launches):
    ours, theirs = counted[model]
    assert ours.launches <= launches
    assert ours.bytes <= 0.5 * theirs.bytes
    assert ours.flops <= theirs.flops


def test_the_host_stays_out_of_a_step_and_nothing_is_copied(counted):
    for ours, _ in counted.values():
        assert ours.host_operators == ours.host_copies == 0
        assert not [row.operator for row in ours.step if row.kind == "copy"]


@pytest.mark.parametrize(("model", "operators"), [("cifar10", 440), ("lsun", 569)])
def test_the_peer_launches_what_was_counted_by_hand(counted, model, operators):
    """Without fused attention (ten operators for the one of a card), and GroupNorm and biases one operator each."""
    _, theirs = counted[model]
    rows = [row for row in theirs.step if row.kind not in ("conv bias", "update")]
    attentions = sum(row.kind == "attention" for row in rows)
    assert len(rows) - 2 * sum(row.operator == "moments" for row in rows) + 9 * attentions == operators


@pytest.mark.parametrize("model", ["cifar10", "lsun"])
def test_flops_agree_with_pytorch_s_own_counter(modules, counted, model):
    ledger, counting, _ = modules
    config = ledger.UNETS[model]
    batch = {"cifar10": 64, "lsun": 8}[model]
    with torch.no_grad(), counting.fake_cuda():
        unet = ledger.build(UNet2DModel, config, torch.float16)
        sample = ledger.noise(config, batch, torch.float16)
        with FlopCounterMode(display=False) as reference:
            unet(sample, 3)
    assert counted[model][1].flops == reference.get_total_flops()


@pytest.mark.parametrize("time", ["default", "scale_shift"])
def test_a_labelled_model_reads_its_time_vectors_in_place(modules, time):
    """The slices of a (B, columns) table have a stride between images; no contiguous copy is made of them."""
    config = dict(
        modules[0].UNETS["digits"], num_class_embeds=10, resnet_time_scale_shift=time, attn_norm_num_groups=8
    )
    ours = modules[0].count_ours(config, 4, torch.float16)
    plain = modules[0].count_ours(modules[0].UNETS["digits"], 4, torch.float16)
    assert not [row.operator for row in ours.step if row.kind == "copy"]
    assert len(ours.step) == len(plain.step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_batch_and_no_dtype_costs_a_copy(modules, batch, dtype):
    (ours,) = modules[0].ledgers("digits", batch, dtype).values()
    assert not [row.operator for row in ours.step if row.kind == "copy"]


def test_a_longer_window_shares_its_tables_out_over_more_steps(modules, counted):
    ours, _ = counted["digits"]
    assert ours.steps == modules[0].STEPS and ours.window
    assert len(ours.step) < ours.launches < len(ours.step) + 1


def rows_of(counting, run, *shapes, dtype=torch.float16):
    with torch.no_grad(), counting.fake_cuda(), counting.counting() as counter:
        run(*(torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes))
    return [row for row in counter.rows if row.operator != "empty"]


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 4), size=st.integers(3, 9), cin=st.integers(1, 5), cout=st.integers(1, 5))
def test_a_convolution_with_a_bias_is_two_passes(modules, batch, size, cin, cout):
    shapes = ((batch, cin, size, size), (cout, cin, 3, 3), (cout,))
    conv, bias = rows_of(modules[1], lambda x, w, b: F.conv2d(x, w, b, padding=1), *shapes)
    pixels = batch * size * size
    assert conv.read == 2 * (pixels * cin + 9 * cin * cout) and conv.written == 2 * pixels * cout
    assert conv.flops == 2 * 9 * pixels * cin * cout
    assert (bias.read, bias.written, bias.flops) == (2 * (pixels + 1) * cout, conv.written, 0)
    assert (conv.kind, bias.kind) == ("conv", "conv bias")


def test_views_are_free_and_repeated_elements_count_once(modules):
    counting = modules[1]
    assert rows_of(counting, lambda x: x.view(-1).unsqueeze(0).expand(5, -1)[2:].T.detach(), (4, 6)) == []
    (row,) = rows_of(counting, lambda x, y: x + y.expand(8, 4), (8, 4), (4,))
    assert (row.read, row.written) == (2 * (32 + 4), 2 * 32)
    (row,) = rows_of(counting, lambda x: x * x, (8,))
    assert (row.read, row.written) == (16, 16)


def test_what_is_overwritten_is_read_only_where_it_is_needed(modules):
    (add,) = rows_of(modules[1], lambda x, y: x.add_(y), (8,), (8,))
    assert (add.read, add.written) == (32, 16)
    (copy,) = rows_of(modules[1], lambda x, y: x.copy_(y), (8,), (8,))
    assert (copy.read, copy.written, copy.kind) == (16, 16, "copy")
    (product,) = rows_of(modules[1], lambda c, a, b: c.addmm_(a, b), (2, 4), (2, 3), (3, 4))
    assert (product.read, product.written, product.flops) == (2 * (8 + 6 + 12), 16, 2 * 2 * 3 * 4)


@pytest.mark.parametrize(("size", "kernels"), [(8, ["single"]), (256, ["statistics", "apply"])])
def test_a_kernel_counts_as_it_launches(modules, size, kernels):
    def norm(x, weight, bias):
        group_norm(x, weight, bias, 8, 1e-5)

    rows = rows_of(modules[1], norm, (2, size, size, 64), (64,), (64,))
    image = 2 * 2 * size * size * 64
    assert [row.operator for row in rows] == kernels
    assert all(image <= row.read <= 1.05 * image for row in rows) and rows[-1].written == image


def test_what_the_host_does_is_told_from_what_the_device_does(modules):
    def step(x):
        table = torch.arange(4.0)
        x * table[2].sqrt() + table.to("cuda")[1]

    with torch.no_grad(), modules[1].fake_cuda(), modules[1].counting() as counter:
        step(torch.empty(8, device="cuda"))
    assert counter.host_operators == 3 and counter.host_copies == 1


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 10**9), flops=st.integers(0, 10**13), launches=st.integers(1, 50))
def test_a_prediction_is_never_below_the_roofline_nor_a_graph_slower(modules, size, flops, launches):
    counting, roofline = modules[1:]
    rows = [counting.Row("conv", "convolution", size, size, flops, torch.float16)] * launches
    for card in roofline.CARDS:
        eager, graph = (roofline.predict(card, rows, graph=graph).seconds for graph in (False, True))
        assert launches * max(2 * size / card.bandwidth, flops / card.half) < graph < eager


def test_the_command_writes_what_it_prints(modules, tmp_path, capsys):
    file = tmp_path / "ledger.json"
    arguments = ["--model", "digits", "--batch", "2", "--peer", "diffusers", "--json", str(file)]
    assert modules[0].main(arguments) == 0
    text, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "PREDICTION, not a measurement" in text and "H100" in text and "RTX 4090" in text
    for engine in found["engines"].values():
        assert f"{engine['launches']:.1f} launches, {engine['bytes'] / 1e9:.3f} GB" in text
        moved = sum(kind["bytes_read"] + kind["bytes_written"] for kind in engine["kinds"].values())
        assert moved == pytest.approx(engine["bytes"])
        assert sum(kind["launches"] for kind in engine["kinds"].values()) == pytest.approx(engine["launches"])
    assert found["ratios"]["diffusers"]["bytes"] < 1
    assert {entry["mode"] for entry in found["predictions"]} == {"eager", "graph"}


@settings(max_examples=20, deadline=None)
@given(height=st.integers(2, 9), width=st.integers(2, 9), channels=st.integers(1, 3))
def test_halving_needs_no_padded_copy(height, width, channels):
    x, weight = torch.randn(2, channels, height, width), torch.randn(4, channels, 3, 3)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2)
    torch.testing.assert_close(F.conv2d(x, padded_weight(weight), stride=2, padding=1), expected)


@pytest.mark.skipif(not launch.INTERPRETED, reason="the interpreter was not chosen in this process")
@pytest.mark.parametrize("blocks", [("UpBlock2D", "UpBlock2D"), ("AttnUpBlock2D", "UpBlock2D")])
def test_biases_that_wait_change_nothing(blocks):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=blocks,
    ).eval()
    sample = torch.randn(2, 3, 4, 4)
    with torch.no_grad(), launch.interpret_cpu(True):
        for name, parameter in unet.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        packed = pack(unet)
        waiting = [resnet.leaves_bias for stage in packed.up for resnet, _ in stage.layers]
        assert any(waiting[:3]) != ("Attn" in blocks[0]) and all(waiting[3:])
        row = time_table(packed, unet, torch.tensor([7]), None)[0]
        fused = fused_forward(packed, sample.permute(0, 2, 3, 1).contiguous(), row) + packed.conv_out.bias
        expected = unet(sample, 7).sample.permute(0, 2, 3, 1)
    assert float((fused - expected).norm() / expected.norm()) <= 2e-5
