"""A network that is not exactly as its config has it runs as it is: the fused engine reads it, or its modules run."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel

SMALL = dict(
    sample_size=8,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


def make(**config):
    torch.manual_seed(0)
    pipe = DDIMPipeline(UNet2DModel(**{**SMALL, **config}).eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, engine="auto"):
    pipe.engine = engine
    return pipe(seeds=[1, 2], num_inference_steps=2, output_type="latent").images


def middle(unet):
    return unet.mid_block.resnets[0]


def circular(unet):
    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.padding_mode = "circular"


def dilated(unet):
    middle(unet).conv1.dilation = middle(unet).conv1.padding = (2, 2)


def own_conv_forward(unet):
    conv = unet.conv_out
    conv._conv_forward = lambda *inputs: 2 * type(conv)._conv_forward(conv, *inputs)


def parametrized(unet):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(unet.conv_out, "weight", Double())


def as_attribute(unet):
    """What flattening wrappers do: the weight is a plain attribute, made of a parameter elsewhere."""
    weight = unet.conv_out.weight.detach() * 2
    del unet.conv_out.weight
    unet.conv_out.weight = weight


def other_class(unet):
    class Doubled(UNet2DModel):
        def embed(self, *inputs):
            return 2 * super().embed(*inputs)

    unet.__class__ = Doubled


def half_of_it(unet):
    unet.mid_block.attentions[0].to_q.register_forward_hook(lambda module, inputs, output: output / 2)


def without_bias(unet):
    unet.conv_in = nn.Conv2d(3, 8, 3, padding=1, bias=False)


def said_by_config(unet):
    unet.register_to_config(center_input_sample=True)


EDITS = {
    "conv_in (Conv2d)": circular,
    "mid_block.resnets.0.conv1 (Conv2d)": dilated,
    "_conv_forward of conv_out (Conv2d) is patched": own_conv_forward,
    "bias of conv_in (Conv2d)": without_bias,
    "padding of conv_in (Conv2d) is 'same'": lambda unet: setattr(unet.conv_in, "padding", "same"),
    "groups of mid_block.resnets.0.conv1": lambda unet: setattr(
        middle(unet), "conv1", nn.Conv2d(16, 16, 3, padding=1, groups=4)
    ),
    "padding_mode of conv_out": lambda unet: unet.conv_out.__init__(8, 3, 3, padding=1, padding_mode="reflect"),
    "eps of conv_norm_out": lambda unet: setattr(unet.conv_norm_out, "eps", 0.5),
    "num_groups of conv_norm_out": lambda unet: setattr(unet.conv_norm_out, "num_groups", 2),
    "affine of conv_norm_out": lambda unet: setattr(unet, "conv_norm_out", nn.GroupNorm(4, 8, affine=False)),
    "bias of mid_block.attentions.0.to_q": lambda unet: setattr(
        unet.mid_block.attentions[0], "to_q", nn.Linear(16, 16, bias=False)
    ),
    "mid_block.attentions.0 (Identity)": lambda unet: unet.mid_block.attentions.__setitem__(0, nn.Identity()),
    "conv_act (Tanh)": lambda unet: setattr(unet, "conv_act", nn.Tanh()),
    "head_dim of mid_block.attentions.0": lambda unet: (
        setattr(unet.mid_block.attentions[0], "heads", 4) or setattr(unet.mid_block.attentions[0], "head_dim", 4)
    ),
    "output_scale_factor of mid_block.resnets.0": lambda unet: setattr(middle(unet), "output_scale_factor", 3.0),
    "skip_time_act of mid_block.resnets.0": lambda unet: setattr(middle(unet), "skip_time_act", True),
    "freq_shift of time_proj": lambda unet: setattr(unet.time_proj, "freq_shift", 0.5),
    "conv_out (ParametrizedConv2d)": parametrized,
    "weight of conv_out (Conv2d) is no longer registered": as_attribute,
    "has its own embed": other_class,
    "forward hooks": half_of_it,
    "torch.float64": lambda unet: unet.double(),
    "the config has": lambda unet: unet.register_to_config(norm_eps=0.5),
}


@pytest.mark.parametrize("reason", EDITS)
def test_an_edited_module_runs_as_edited(reason, caplog):
    pipe = make()
    draw(pipe)
    EDITS[reason](pipe.unet)
    with caplog.at_level("INFO", logger="ddim_fast.engine"):
        images = draw(pipe)
    name, why = pipe.runner.choose()
    assert name == "plain" and reason in why and why in caplog.text
    assert torch.equal(images, draw(pipe, "plain"))


def test_dropout_in_training_mode_alone_draws():
    pipe = make(dropout=0.5)
    draw(pipe)
    assert pipe.runner.choose()[0] == "fused"
    middle(pipe.unet).dropout.train()
    assert pipe.runner.choose() == (
        "plain",
        "mid_block.resnets.0.dropout (Dropout) is in training mode; call unet.eval()",
    )
    assert not torch.equal(draw(pipe), draw(pipe))


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
def test_a_method_that_is_patched_on_a_class_of_pytorch_runs(monkeypatch, method):
    pipe = make()
    before, stock = draw(pipe), getattr(nn.Conv2d, method)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, method, lambda self, *inputs: 1.1 * stock(self, *inputs))
        patched = draw(pipe)
        assert torch.equal(patched, draw(pipe, "plain")) and not torch.equal(patched, before)
    assert torch.equal(draw(pipe), before)


def test_hooks_for_all_modules_run():
    pipe = make()
    before, seen = draw(pipe), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        draw(pipe)
    finally:
        handle.remove()
    assert seen and torch.equal(draw(pipe), before) and pipe.runner.choose()[0] == "fused"


HARMLESS = {
    "backward hooks": lambda unet: unet.conv_in.register_full_backward_hook(lambda *anything: None),
    "a note": lambda unet: setattr(unet, "my_note", "trained on Tuesday"),
    "another sample size": lambda unet: setattr(unet, "sample_size", 16),
    "gradient checkpointing": lambda unet: unet.enable_gradient_checkpointing(),
    "frozen weights": lambda unet: unet.requires_grad_(False),
    "training mode without dropout": lambda unet: unet.train(),
    "a subclass that adds a method": lambda unet: setattr(unet, "__class__", type("Mine", (UNet2DModel,), {"fit": 1})),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_has_no_part_in_a_forward_keeps_the_fused_engine(what):
    pipe = make()
    before = draw(pipe)
    HARMLESS[what](pipe.unet)
    assert pipe.runner.choose()[0] == "fused" and torch.equal(draw(pipe), before)


UNET = make().unet
PLACES = [
    (path, name)
    for path, module in UNET.named_modules()
    for name, value in vars(module).items()
    if isinstance(value, (bool, int, float, str, tuple)) or (value is None and not name.startswith("_"))
]
VALUES = [True, False, 0, 1, 2, 4, 0.5, 3.0, (1, 1), (2, 2), "same", "circular", "scale_shift", None]


@given(place=st.sampled_from(PLACES), value=st.sampled_from(VALUES))
@settings(max_examples=60, deadline=None)
def test_any_attribute_of_any_module_is_followed(place, value):
    """The fused engine computes what the edited modules do, or they run, or both refuse."""
    unet = copy.deepcopy(UNET)
    path, name = place
    vars(unet.get_submodule(path))[name] = value
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    try:
        expected = draw(pipe, "plain")
    except Exception as error:
        with pytest.raises(type(error)):
            draw(pipe)
        return
    images = draw(pipe)
    if pipe.runner.choose()[0] == "plain":
        assert torch.allclose(images, expected, 0, 0, equal_nan=True)
    else:
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
