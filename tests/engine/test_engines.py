"""The engines side by side: the same pictures, chosen at run time, undisturbed by one another."""

import copy
import threading

import numpy as np
import pytest
import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.engine.loop import initial_state, make_run, predict_plain, run_eagerly, update_by_kernel
from ddim_fast.once import log_once
from ddim_fast.request import make_request

SMALL = dict(
    sample_size=8,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


def make(seed=0, engine="auto", **config):
    torch.manual_seed(seed)
    pipe = DDIMPipeline(UNet2DModel(**{**SMALL, **config}).eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.engine = engine
    return pipe


def draw(pipe, steps=3, **arguments):
    return pipe(
        **{"seeds": [1, 2], "batch_size": 2, "num_inference_steps": steps, "output_type": "latent", **arguments}
    ).images


@pytest.fixture(scope="module")
def digits():
    pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_a_size_that_the_network_cannot_halve_is_refused(engine):
    with pytest.raises(ValueError, match="divisible by 2"):
        draw(make(engine=engine, sample_size=7, downsample_padding=0))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_fifty_steps_of_the_digits_model_give_the_pictures_of_the_plain_engine(digits, eta):
    pictures = {}
    for engine in ("plain", "fused"):
        digits.engine = engine
        pictures[engine] = digits(4, seeds=range(4), eta=eta, output_type="uint8").images.astype(int)
    levels = np.abs(pictures["plain"] - pictures["fused"])
    assert levels.max() <= 1 and (levels > 0).mean() <= 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_the_fused_engine_no_more_than_the_plain_one(digits, dtype):
    digits.engine = "plain"
    expected = digits(2, seeds=[0, 1], num_inference_steps=5, output_type="np").images
    half = DDIMPipeline(copy.deepcopy(digits.unet), digits.scheduler).to(dtype)
    half.set_progress_bar_config(disable=True)
    errors = {}
    for half.engine in ("plain", "fused"):
        images = half(2, seeds=[0, 1], num_inference_steps=5, output_type="np").images
        errors[half.engine] = np.linalg.norm(images - expected) / np.linalg.norm(expected)
    print(errors)
    assert 0 < errors["fused"] <= 2 * errors["plain"]


def test_the_fused_engine_runs_without_being_asked():
    pipe = make()
    assert pipe.runner.choose()[0] == "fused" and pipe.runner.packed is None
    draw(pipe)
    assert pipe.runner.packed is not None


def test_the_engine_can_be_changed_between_calls():
    pipe = make()
    images = []
    for engine in ("plain", "fused", "plain", "auto"):
        pipe.engine = engine
        images.append(draw(pipe))
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[3])
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)


def test_changed_weights_change_the_pictures():
    """Edits in place, another dtype and loaded weights are noticed; nothing stale is drawn with."""
    pipe, other = make(), make(seed=1)
    draw(pipe)
    with torch.no_grad():
        pipe.unet.up_blocks[1].resnets[0].conv1.weight.mul_(1.5)
        pipe.unet.mid_block.attentions[0].to_q.bias.add_(0.1)
    edited = draw(pipe)
    pipe.engine = "plain"
    torch.testing.assert_close(edited, draw(pipe), atol=1e-4, rtol=1e-4)
    pipe.engine = "fused"
    pipe.unet.load_state_dict(other.unet.state_dict())
    torch.testing.assert_close(draw(pipe), draw(other), atol=1e-6, rtol=1e-6)


def test_exact_turns_the_fast_convolutions_off():
    pipe = make(block_out_channels=(64, 64), sample_size=32, norm_num_groups=32)
    fast = draw(pipe, steps=1)
    pipe.exact = True
    exact = draw(pipe, steps=1)
    assert all(layer.conv2.exact for stage in pipe.runner.packed.down for layer, _ in stage.layers)
    torch.testing.assert_close(fast, exact, atol=1e-4, rtol=1e-4)


def test_threads_with_a_pipeline_each_do_not_disturb_one_another():
    pipes = [make(seed=seed) for seed in range(3)]
    expected = [draw(pipe, eta=0.5) for pipe in pipes]
    found = [None] * 3

    def work(index):
        for _ in range(3):
            found[index] = draw(pipes[index], eta=0.5)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_model_with_an_unknown_block_runs_plain_and_is_named_once(caplog):
    pipe = make(
        block_out_channels=(32, 32),
        norm_num_groups=32,
        down_block_types=("SkipDownBlock2D",) * 2,
        up_block_types=("SkipUpBlock2D",) * 2,
    )
    with caplog.at_level("INFO", logger="ddim_fast.engine"):
        draw(pipe, steps=1)
        draw(pipe, steps=1)
    assert caplog.text.count("does not know the block SkipDownBlock2D") == 1


EXOTIC = {
    "learned": dict(time_embedding_type="learned", num_train_timesteps=1000),
    "fourier": dict(time_embedding_type="fourier"),
    "gelu": dict(act_fn="gelu"),
    **{
        blocks[0]: dict(
            block_out_channels=(32, 32),
            norm_num_groups=32,
            down_block_types=(blocks[0],) * 2,
            up_block_types=(blocks[1],) * 2,
        )
        for blocks in (
            ("SkipDownBlock2D", "SkipUpBlock2D"),
            ("AttnSkipDownBlock2D", "AttnSkipUpBlock2D"),
            ("KDownBlock2D", "KUpBlock2D"),
        )
    },
}


@pytest.mark.parametrize("config", EXOTIC.values(), ids=EXOTIC)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_plain_modules_in_the_engine_s_loop_give_the_plain_engine_s_pictures(config, eta):
    """What a graph of a model with an unknown block captures."""
    pipe = make(engine="plain", **config)
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = [800, 500, 100]
    generator = torch.Generator().manual_seed(1)
    expected = draw(pipe, seeds=None, latents=start, eta=eta, generator=generator, timesteps=timesteps)
    assert torch.isfinite(expected).all()
    generator.manual_seed(1)
    request = make_request(
        pipe.unet.config, torch.device("cpu"), latents=start, eta=eta, generator=generator, timesteps=timesteps
    )
    with torch.no_grad():
        run = make_run(pipe.unet, None, request, pipe.scheduler.step_table(None, eta, timesteps))
        images = run_eagerly(run, initial_state(run), predict_plain(pipe.unet), update_by_kernel, lambda steps: None)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)


def test_a_learned_time_embedding_runs_fused():
    pipe = make(**EXOTIC["learned"])
    assert pipe.runner.choose()[0] == "fused"
    fused = draw(pipe)
    pipe.engine = "plain"
    torch.testing.assert_close(fused, draw(pipe), atol=1e-4, rtol=1e-4)


class Adapter(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def adapt(unet):
    attention = unet.mid_block.attentions[0]
    adapter = Adapter(16, 16)
    adapter.load_state_dict(attention.to_q.state_dict())
    attention.to_q = adapter


def patch(unet):
    forward = unet.mid_block.forward
    unet.mid_block.forward = lambda *arguments: 2 * forward(*arguments)


ALTERATIONS = {
    "mid_block.attentions.0.to_q (Adapter) is not one of": adapt,
    "the forward of mid_block (UNetMidBlock2D) is patched": patch,
    "mid_block (UNetMidBlock2D) has forward hooks": lambda unet: unet.mid_block.register_forward_hook(
        lambda module, inputs, output: 2 * output
    ),
    "down_blocks.0.resnets.0.nonlinearity (GELU) stands where the config has a SiLU": lambda unet: setattr(
        unet.down_blocks[0].resnets[0], "nonlinearity", torch.nn.GELU()
    ),
}


@pytest.mark.parametrize("reason", ALTERATIONS)
def test_a_model_that_somebody_altered_runs_as_altered(reason):
    """Adapters, hooks and patches would be passed by, silently, if packed weights ran in their place."""
    pipe = make()
    before = draw(pipe)
    ALTERATIONS[reason](pipe.unet)
    name, why = pipe.runner.choose()
    assert name == "plain" and reason in why
    after = draw(pipe)
    pipe.engine = "plain"
    assert torch.equal(after, draw(pipe)) and (after - before).abs().max() > 1e-2


def test_two_pipelines_on_one_model_see_each_other_s_edits():
    one = make()
    two = DDIMPipeline(one.unet, one.scheduler)
    two.set_progress_bar_config(disable=True)
    assert torch.equal(draw(one), draw(two))
    with torch.no_grad():
        one.unet.mid_block.attentions[0].to_v.weight.mul_(2)
    torch.testing.assert_close(draw(one), draw(two))
    assert two.runner.packed is not one.runner.packed


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.register_buffer("kernel", torch.ones(2)),
        lambda unet: setattr(unet.conv_in, "weight", torch.nn.Parameter(unet.conv_in.weight.detach())),
        lambda unet: setattr(unet.conv_in.weight, "data", unet.conv_in.weight.data.clone()),
        lambda unet: unet.double().float(),
        lambda unet: unet.train(),
    ],
)
def test_whatever_happens_to_the_weights_is_noticed(change):
    pipe = make()
    draw(pipe)
    first = pipe.runner.packed
    draw(pipe)
    assert pipe.runner.packed is first
    change(pipe.unet)
    draw(pipe)
    assert pipe.runner.packed is not first


def test_asking_for_gradients_packs_nothing_anew():
    pipe = make()
    draw(pipe)
    first = pipe.runner.packed
    pipe.unet.requires_grad_(False)
    draw(pipe)
    assert pipe.runner.packed is first


def test_autocast_is_said_to_change_nothing(caplog):
    log_once.cache_clear()
    pipe = make()
    expected = draw(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(draw(pipe), expected) and torch.equal(draw(pipe), expected)
        assert torch.is_autocast_enabled("cpu")
    assert caplog.text.count("autocast changes nothing here, the model runs in torch.float32") == 1


def test_inference_mode_leaves_a_model_that_still_trains():
    pipe = make()
    with torch.inference_mode():
        expected = draw(pipe)
    assert torch.equal(draw(pipe), expected) and not expected.is_inference()
    pipe.unet(torch.randn(1, 3, 8, 8), 3).sample.sum().backward()
    assert pipe.unet.conv_in.weight.grad is not None
