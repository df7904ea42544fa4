"""The limit of dynamic thresholding: `torch.quantile`'s number, for images of any size."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from support import relative_l2

from ddim_fast.kernels.ddim_step import ddim_step
from ddim_fast.kernels.x0_quantile import quantile, x0_quantile


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 5000), ratio=st.floats(0, 1), seed=st.integers(0, 9))
def test_it_is_torch_quantile(count, ratio, seed):
    values = torch.rand((2, count), generator=torch.Generator().manual_seed(seed))
    difference = quantile(values, ratio) - torch.quantile(values, ratio, dim=1)
    assert difference.abs().max() <= 5e-7


def test_a_nan_shows_in_its_image_alone():
    values = torch.rand(3, 1000)
    values[1, 17] = float("nan")
    assert quantile(values, 0.9).isnan().tolist() == [False, True, False]


def test_an_image_may_have_more_than_16_million_elements():
    values = torch.rand(1, 2**24 + 1)
    rank = int(0.995 * 2**24)
    expected = np.partition(values[0].numpy(), rank)[rank]
    # Neighbouring order statistics of so many values lie closer than this.
    assert abs(quantile(values, 0.995).item() - expected) < 1e-6


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_both_together_are_diffusers_dynamic_thresholding(device, prediction_type):
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.4, "clip_sample": False}
    scheduler = DDIMScheduler(prediction_type=prediction_type, **config)
    scheduler.set_timesteps(10)
    now, before = scheduler.alphas_cumprod[100].item(), scheduler.alphas_cumprod[0].item()
    rows = [[now**0.5, (1 - now) ** 0.5, before**0.5, (1 - before) ** 0.5, 0, 100, 8, 0, 0, 0, 0, 0]]
    table = torch.tensor(rows, device=device)
    x, m = (torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    strength = torch.tensor([0.2, 0.7, 2.0]).view(3, 1, 1, 1)
    x, m = x * strength, m * strength
    bias = torch.tensor([0.1, -0.2, 0.0])
    expected = scheduler.step(m + bias[:, None, None], 100, x)

    arguments = (x.to(device), m.contiguous(memory_format=torch.channels_last).to(device), table, 0)
    options = {"prediction_type": prediction_type, "model_bias": bias.to(device)}
    threshold = x0_quantile(*arguments, ratio=0.9, max_value=1.4, **options)
    assert threshold.min() >= 1 and threshold.max() <= 1.4 and threshold.unique().numel() > 1
    prev_sample, x0 = ddim_step(*arguments, threshold=threshold, return_x0=True, **options)
    assert relative_l2(prev_sample, expected.prev_sample) <= 2e-6
    assert relative_l2(x0, expected.pred_original_sample) <= 2e-6


@pytest.mark.parametrize(("option", "value"), [("ratio", 1.5), ("ratio", -0.1), ("max_value", 0.5)])
def test_wrong_options_are_named(option, value):
    image = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=f"`{option}`"):
        x0_quantile(image, image, torch.ones(1, 12), 0, prediction_type="epsilon", **{option: value})


@pytest.mark.gpu
def test_a_captured_graph_replays_it_with_other_images(device):
    x, m = torch.randn(2, 2, 3, 64, 64, device=device)
    table = torch.full((1, 12), 0.6, device=device)
    x0_quantile(x, m, table, 0, prediction_type="epsilon", max_value=9.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        threshold = x0_quantile(x, m, table, 0, prediction_type="epsilon", max_value=9.0)
    x.mul_(2)
    graph.replay()
    assert torch.equal(threshold, x0_quantile(x, m, table, 0, prediction_type="epsilon", max_value=9.0))
