"""A network of diffusers' or of the user's own computes in our pipeline what it computes in diffusers'."""

import copy
import pickle

import diffusers
import pytest
import torch
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


def theirs(**config):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{**SMALL, **config}).eval()


def ours():
    torch.manual_seed(0)
    return UNet2DModel(**SMALL).eval()


def pipe_of(unet):
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **arguments):
    arguments = {"num_inference_steps": 2, "output_type": "np", **arguments}
    return torch.as_tensor(pipe(generator=torch.Generator().manual_seed(0), **arguments).images)


def by_diffusers(unet):
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return draw(pipe)


def output_hook(unet):
    unet.mid_block.register_forward_hook(lambda module, inputs, output: output * 0.5)


def input_hook(unet):
    unet.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.9, *inputs[1:]))


def patched_forward(unet):
    forward = unet.mid_block.forward
    unet.mid_block.forward = lambda *inputs, **options: 2 * forward(*inputs, **options)


def circular(unet):
    for module in unet.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.padding_mode = "circular"


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapters(unet):
    for attention in (unet.mid_block.attentions[0], unet.down_blocks[1].attentions[0]):
        attention.to_q = Adapted(attention.to_q)


def subclass(unet):
    class Halved(diffusers.UNet2DModel):
        def forward(self, *inputs, **options):
            result = super().forward(*inputs, **options)
            return (result[0] / 2,) if isinstance(result, tuple) else type(result)(sample=result.sample / 2)

    unet.__class__ = Halved


EDITS = {
    "output hook": output_hook,
    "input hook": input_hook,
    "patched forward": patched_forward,
    "another activation": lambda unet: setattr(unet, "conv_act", nn.Tanh()),
    "other groups": lambda unet: setattr(unet, "conv_norm_out", nn.GroupNorm(2, 8)),
    "other eps": lambda unet: setattr(unet.conv_norm_out, "eps", 0.5),
    "circular padding": circular,
    "adapters": adapters,
    "a subclass": subclass,
    "scale of attention": lambda unet: setattr(unet.mid_block.attentions[0], "rescale_output_factor", 3.0),
    "another processor": lambda unet: setattr(unet.mid_block.attentions[0], "processor", lambda attn, x, **_: 2 * x),
}


def test_a_stock_network_is_taken_over_with_its_parameters():
    unet = theirs()
    pipe = pipe_of(unet)
    assert type(pipe.unet) is UNet2DModel and pipe.runner.choose()[0] == "fused"
    assert all(mine is other for mine, other in zip(pipe.unet.parameters(), unet.parameters(), strict=True))
    torch.testing.assert_close(draw(pipe), by_diffusers(unet), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", EDITS)
def test_an_edited_network_runs_as_it_is_wherever_it_comes_in(how):
    unet = theirs()
    EDITS[how](unet)
    expected = by_diffusers(unet)
    pipe = pipe_of(unet)
    assigned, registered = pipe_of(ours()), pipe_of(ours())
    assigned.unet = unet
    registered.register_modules(unet=unet)
    for each in (pipe, assigned, registered, DDIMPipeline.from_pipe(pipe)):
        each.set_progress_bar_config(disable=True)
        assert each.unet is unet and each.runner.choose()[0] == "plain"
        torch.testing.assert_close(draw(each), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", EDITS)
def test_an_edit_after_the_take_over_is_seen(how):
    unet = theirs()
    pipe = pipe_of(unet)
    shared = DDIMPipeline.from_pipe(pipe)
    shared.set_progress_bar_config(disable=True)
    before = draw(pipe)
    EDITS[how](unet)
    for each in (pipe, shared):
        after = draw(each)
        torch.testing.assert_close(after, by_diffusers(unet), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(after, before, atol=1e-4)


def test_an_edit_that_is_undone_brings_the_fused_engine_back():
    unet = theirs()
    handle = unet.mid_block.register_forward_hook(lambda module, inputs, output: output * 0.5)
    pipe = pipe_of(unet)
    draw(pipe)
    handle.remove()
    torch.testing.assert_close(draw(pipe), by_diffusers(unet), atol=1e-4, rtol=1e-4)
    assert pipe.runner.choose()[0] == "fused"


@pytest.mark.parametrize(
    "edit",
    [
        lambda unet: unet.conv_out.weight.detach().numpy().__imul__(2),
        lambda unet: setattr(unet.conv_out, "weight", nn.Parameter(unet.conv_out.weight.detach() * 2)),
        lambda unet: unet.load_state_dict(theirs(norm_eps=1e-6).state_dict()),
        lambda unet: setattr(unet.conv_out.weight, "data", unet.conv_out.weight.data * 2),
    ],
)
def test_new_weights_of_the_owner_show(edit):
    unet = theirs()
    with torch.no_grad():
        unet.conv_in.weight.mul_(1.5)
    pipe = pipe_of(unet)
    before = draw(pipe)
    edit(unet)
    after = draw(pipe)
    torch.testing.assert_close(after, by_diffusers(unet), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


def test_copies_belong_to_nobody():
    pipe = pipe_of(theirs())
    for unet in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        assert vars(unet)["owner"] is None
        torch.testing.assert_close(draw(pipe_of(unet)), draw(pipe))


class Wrapped(nn.Module):
    """A network behind a forward of two inputs, as users write them."""

    def __init__(self, unet, wrap=lambda output: output):
        super().__init__()
        self.unet, self.wrap = unet, wrap

    def forward(self, x, t):
        return self.wrap(self.unet(x, t).sample)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, None), lambda x: {"sample": x}], ids=["tensor", "tuple", "dict"]
)
def test_a_wrapper_of_the_user_s_own_is_called_with_sample_and_timestep(wrap):
    unet = ours()
    pipe = pipe_of(Wrapped(unet, wrap))
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(draw(pipe, latents=start), draw(pipe_of(unet), latents=start), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"no config\.in_channels.*pass latents="):
        draw(pipe)
    pipe.unet.config = unet.config
    torch.testing.assert_close(draw(pipe), draw(pipe_of(unet)), atol=1e-4, rtol=1e-4)


def test_a_module_that_holds_another_as_module_runs_its_own_forward():
    class Half(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.config = module, module.config

        def forward(self, sample, timestep):
            return self.module(sample, timestep).sample / 2

    assert not torch.allclose(draw(pipe_of(Half(ours()))), draw(pipe_of(ours())))


@pytest.mark.parametrize(
    "wrapper", [nn.DataParallel, lambda unet: torch.compile(unet, backend="eager")], ids=["DataParallel", "compile"]
)
def test_what_wrappers_of_pytorch_hold_runs(wrapper):
    unet = ours()
    pipe = pipe_of(wrapper(unet))
    assert pipe.unet is unet and pipe.runner.choose()[0] == "fused"


def test_labels_reach_a_network_by_their_name_or_place():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "num_class_embeds": 10}

        def forward(self, x, t, y):
            return x * y[:, None, None, None]

    one, two = (draw(pipe_of(Labelled()), class_labels=[label]) for label in (1, 2))
    assert not torch.equal(one, two)


def test_a_network_of_other_inputs_is_refused():
    class Texts(nn.Module):
        def forward(self, sample, timestep, encoder_hidden_states):
            return sample

    with pytest.raises(TypeError, match="takes other inputs"):
        pipe_of(Texts())
    with pytest.raises(TypeError, match="returned a NoneType"):
        draw(pipe_of(Wrapped(ours(), lambda x: None)), latents=torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("make", [ours, theirs])
def test_a_network_that_accelerate_offloads_runs_where_its_hook_says(make):
    accelerate = pytest.importorskip("accelerate")
    expected = draw(pipe_of(make()))
    unet = make()
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    torch.testing.assert_close(draw(pipe_of(unet)), expected, atol=1e-4, rtol=1e-4)
