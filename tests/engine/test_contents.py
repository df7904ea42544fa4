"""Every edit of weights between two calls shows in the next pictures, however it was made."""

import threading

import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.engine.contents import Contents
from ddim_fast.engine.cpu import native
from ddim_fast.engine.cpu.digest import Digests

SMALL = dict(
    sample_size=8,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


def small(seed=0):
    torch.manual_seed(seed)
    return UNet2DModel(**SMALL).eval()


def pipe_of(unet, engine="auto"):
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.engine = engine
    return pipe


def draw(pipe, **arguments):
    arguments = {"seeds": [1, 2], "num_inference_steps": 2, "output_type": "latent", **arguments}
    return pipe(**arguments).images


def optimizer(kind, **options):
    def step(unet):
        torch.manual_seed(1)
        unet(torch.randn(2, 3, 8, 8), torch.tensor([3, 500])).sample.square().mean().backward()
        kind(unet.parameters(), lr=0.05, **options).step()
        unet.zero_grad()

    return step


def without_gradients(edit):
    @torch.no_grad()
    def run(unet):
        for parameter in unet.parameters():
            edit(parameter)

    return run


def ema(**options):
    def copy_to(unet):
        average = EMAModel(small(5).parameters(), **options)
        average.store(unet.parameters())
        average.copy_to(unet.parameters())

    return copy_to


def restored(unet):
    average = EMAModel(unet.parameters())
    average.store(small(5).parameters())
    average.restore(unet.parameters())


def swap_storage(parameter):
    parameter.set_(parameter.clone() * 1.3)


@torch.inference_mode()
def in_inference_mode(unet):
    for parameter in unet.parameters():
        parameter.mul_(1.3)


EDITS = {
    "fused AdamW": optimizer(torch.optim.AdamW, fused=True),
    "fused Adam": optimizer(torch.optim.Adam, fused=True),
    "fused SGD": optimizer(torch.optim.SGD, fused=True),
    "fused Adagrad": optimizer(torch.optim.Adagrad, fused=True),
    "foreach on .data": lambda unet: torch._foreach_mul_([each.data for each in unet.parameters()], 1.3),
    "EMA copied in": ema(),
    "EMA copied in by foreach": ema(foreach=True),
    "EMA restored": restored,
    "EMA copied as ema_pytorch does": lambda unet: [
        mine.data.copy_(other.data) for mine, other in zip(unet.parameters(), small(6).parameters(), strict=True)
    ],
    "an element by .data": lambda unet: unet.conv_out.weight.data[0, 0, 1].add_(1),
    "NumPy": lambda unet: unet.conv_out.weight.detach().numpy().__imul__(2),
    "new .data": without_gradients(lambda parameter: setattr(parameter, "data", parameter.data * 1.3)),
    "set_": without_gradients(swap_storage),
    "inference mode": in_inference_mode,
    "load_state_dict": lambda unet: unet.load_state_dict(small(7).state_dict()),
    "load_state_dict, assigned": lambda unet: unet.load_state_dict(small(7).state_dict(), assign=True),
    "another parameter": lambda unet: setattr(unet.conv_out, "weight", torch.nn.Parameter(unet.conv_out.weight * 2)),
    "signs": lambda unet: unet.conv_in.weight.detach().numpy().__imul__(-1),
    "rows": lambda unet: unet.conv_in.weight.data.copy_(unet.conv_in.weight.data.flip(0).clone()),
}


@pytest.mark.parametrize("how", EDITS)
def test_an_edit_shows_in_the_next_pictures(how):
    unet = small()
    pipe = pipe_of(unet)
    before = draw(pipe)
    EDITS[how](unet)
    after = draw(pipe)
    assert torch.equal(after, draw(pipe_of(unet))) and not torch.allclose(after, before, atol=1e-3)
    assert pipe.runner.choose()[0] == "fused"


def test_edits_of_a_network_made_in_inference_mode_show():
    with torch.inference_mode():
        unet = small()
    pipe = pipe_of(unet)
    before = draw(pipe)
    for edit in (in_inference_mode, torch.inference_mode()(EDITS["load_state_dict"])):
        edit(unet)
        after = draw(pipe)
        assert torch.equal(after, draw(pipe_of(unet))) and not torch.equal(after, before)
        before = after


def test_an_average_over_processes_shows():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        unet = small()
        pipe = pipe_of(unet)
        before = draw(pipe)
        for parameter in unet.parameters():
            # The sum over one process is what was there, so the weights are scaled on the way.
            parameter.data.mul_(1.3)
            dist.all_reduce(parameter.data)
        assert torch.equal(draw(pipe), draw(pipe_of(unet))) and not torch.equal(draw(pipe), before)
    finally:
        dist.destroy_process_group()


def test_an_edit_by_another_thread_shows():
    unet = small()
    pipe = pipe_of(unet)
    draw(pipe)
    thread = threading.Thread(target=EDITS["NumPy"], args=(unet,))
    thread.start()
    thread.join()
    assert torch.equal(draw(pipe), draw(pipe_of(unet)))


def test_weights_that_nobody_edits_are_packed_once():
    pipe = pipe_of(small())
    draw(pipe)
    first = pipe.runner.packed
    draw(pipe)
    assert pipe.runner.packed is first


def test_fixed_weights_are_not_looked_at(monkeypatch):
    pipe = pipe_of(small())
    with pipe.weights_stay():
        draw(pipe)
        monkeypatch.setattr(Contents, "changed_on_host", lambda self: pytest.fail("looked"))
        draw(pipe)
    with pytest.raises(pytest.fail.Exception, match="looked"):
        draw(pipe)


def test_a_verdict_that_comes_late_runs_the_steps_again_from_the_same_noise(monkeypatch):
    """On CUDA the loop is launched before the host knows whether the weights were edited."""
    late = Contents.changed_on_host
    monkeypatch.setattr(Contents, "changed_on_host", lambda self: False)
    monkeypatch.setattr(Contents, "look_on_cards", lambda self: lambda: late(self))
    unet = small()
    pipe = pipe_of(unet)
    draw(pipe)
    unet.conv_out.weight.detach().numpy()[:] *= 2
    steps = []
    pipe.progress_bar = lambda timesteps: (steps.append(each) or each for each in timesteps)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    picture = draw(pipe, seeds=None, generator=generators[0], eta=1.0)
    assert len(steps) == 2
    assert torch.equal(picture, draw(pipe_of(unet), seeds=None, generator=generators[1], eta=1.0))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    torch.manual_seed(8)
    unet.conv_out.weight.detach().numpy()[:] *= 2
    picture, next_number = draw(pipe, seeds=None, eta=1.0), torch.rand(())
    torch.manual_seed(8)
    assert torch.equal(picture, draw(pipe_of(unet), seeds=None, eta=1.0)) and torch.rand(()) == next_number


TENSORS = {
    "dense": lambda: torch.randn(70, 1000),
    "half": lambda: torch.randn(333).half(),
    "from an odd place": lambda: torch.randn(334).bfloat16()[1:],
    "channels last": lambda: torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(5, 7).T,
    "a column": lambda: torch.randn(6, 6)[:, 2],
    "one number": lambda: torch.randn(()),
}


@pytest.mark.parametrize("by_kernel", [True, False])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_digest_tells_any_edit(by_kernel, data):
    tensors = [make() for make in TENSORS.values()]
    with pytest.MonkeyPatch.context() as patch:
        if not by_kernel:
            patch.setattr(native, "available", lambda: False)
        digests = Digests(tensors)
        before = digests.take()
        assert digests.take() == before
        tensor = data.draw(st.sampled_from(tensors))
        index = tuple(data.draw(st.integers(0, length - 1)) for length in tensor.shape)
        kind = data.draw(st.sampled_from(["sign", "ulp", "zero", "nan", "swap", "two"]))
        bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)
        last = tuple(length - 1 for length in tensor.shape)
        if kind == "zero":
            tensor[index] = 0.0
            before = digests.take()
            tensor[index] = -0.0
        elif kind == "nan":
            tensor[index] = float("nan")
            before = digests.take()
            bits[index] ^= 1
        elif kind in ("swap", "two") and index != last:
            bits[index] ^= 5
            before = digests.take()
            one, other = bits[index].clone(), bits[last].clone()
            # Two edits whose sum is none, or two equal words.
            change = (other - one, one - other) if kind == "swap" else (3, -3)
            bits[index] += change[0]
            bits[last] += change[1]
            if kind == "swap" and one == other:
                return
        else:
            bits[index] ^= 1 if kind == "ulp" else torch.iinfo(bits.dtype).min
        assert digests.take() != before


def test_signs_of_a_whole_tensor_do_not_cancel():
    weight = torch.randn(64, 64)
    digests = Digests([weight])
    before = digests.take()
    weight.neg_()
    assert digests.take() != before
