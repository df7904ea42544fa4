"""Networks of guided-diffusion and improved-diffusion predict and sample here as they do there."""

from dataclasses import replace

import pytest
import torch
from guided_diffusion_reference import (
    Network,
    Settings,
    ancestral_samples,
    ddim_samples,
    network_shapes,
    network_time,
    random_state,
)

from ddim_fast.checkpoints.guided_diffusion import read_guided_diffusion
from ddim_fast.engine.pack import unsupported
from ddim_fast.pipeline import DDIMPipeline
from ddim_fast.scheduler import DDIMScheduler
from ddim_fast.unet import UNet2DModel

GUIDED = {
    "resblock_updown and 32 channels a head": Settings(
        updown=True, head_channels=32, mults=(1, 2, 2), attention=(8, 4)
    ),
    "the new order of qkv": Settings(new_order=True, head_channels=16, learn_sigma=True),
    "classes, two residual blocks": Settings(classes=7, blocks=2, mults=(1, 2, 3), attention=(4,), learn_sigma=True),
    "four heads of several widths": Settings(mults=(1, 2, 3), attention=(16, 8, 4), updown=True),
    "other heads on the way up": Settings(heads=4, heads_up=2, attention=(16, 8)),
    "attention in the middle alone": Settings(attention=(), heads=2, cosine=True),
    "a first multiplier of two": Settings(mults=(2, 4), head_channels=32),
    "a first multiplier below one": Settings(channels=256, mults=(0.5, 0.5), head_channels=64, image_size=8),
    "one resolution": Settings(mults=(1,), attention=(16,), predict_xstart=True),
    "rescaled timesteps": Settings(steps=4000, rescale=True, head_channels=32, cosine=True),
}
IMPROVED = {
    "added time embedding, one head": Settings(mults=(1, 2, 2, 2), scale_shift=False, heads=1, image_size=32),
    "4000 cosine timesteps, rescaled": Settings(
        mults=(1, 2, 2, 2), image_size=32, steps=4000, cosine=True, rescale=True, learn_sigma=True, attention=(16, 8)
    ),
    "4000 timesteps as they are": Settings(mults=(1, 2, 3, 4), image_size=64, steps=4000, blocks=2, classes=5),
    "heads of several widths": Settings(mults=(1, 2, 3, 4), image_size=64, learn_sigma=True, attention=(16, 8)),
    "x0 predicted": Settings(mults=(1, 2, 2, 2), image_size=32, predict_xstart=True, cosine=True, attention=(16, 8)),
    "two heads": Settings(mults=(1, 2, 2, 2), image_size=32, heads=2, attention=(16,)),
    "other heads on the way up": Settings(mults=(1, 2, 2, 2), image_size=32, heads=2, heads_up=4, attention=(8, 4)),
    "300 timesteps": Settings(mults=(1, 2, 2, 2), image_size=32, steps=300, rescale=True, cosine=True),
}
ALL = [("guided-diffusion", name, s) for name, s in GUIDED.items()] + [
    ("improved-diffusion", name, s) for name, s in IMPROVED.items()
]
every_network = pytest.mark.parametrize(
    ("repository", "settings"), [(r, s) for r, _, s in ALL], ids=[f"{r}: {name}" for r, name, _ in ALL]
)


def flags_of(settings, repository):
    """The flags that a training command of `repository` needs for `settings`."""
    flags = {
        "image_size": settings.image_size,
        "num_channels": settings.channels,
        "num_res_blocks": settings.blocks,
        "num_heads": settings.heads,
        "num_heads_upsample": settings.heads_up or -1,
        "attention_resolutions": ",".join(map(str, settings.attention)) or "512",
        "class_cond": settings.classes is not None,
        "learn_sigma": settings.learn_sigma,
        "use_scale_shift_norm": settings.scale_shift,
        "diffusion_steps": settings.steps,
        "noise_schedule": "cosine" if settings.cosine else "linear",
        "rescale_timesteps": settings.rescale,
        "predict_xstart": settings.predict_xstart,
    }
    if repository == "guided-diffusion":
        flags |= {
            "channel_mult": ",".join(map(str, settings.mults)),
            "num_head_channels": settings.head_channels or -1,
            "resblock_updown": settings.updown,
            "use_new_attention_order": settings.new_order,
        }
    return " ".join(f"--{name} {value}" for name, value in flags.items())


def converted(settings, repository, state, **options):
    flags = options.pop("flags", None) or flags_of(settings, repository)
    return read_guided_diffusion(state, "model.pt", flags=flags, repository=repository, **options)


def build(recognized):
    unet = UNet2DModel.from_config(recognized.unet)
    unet.load_state_dict(recognized.state)
    return unet.eval(), DDIMScheduler.from_config(recognized.scheduler)


def inputs(settings, batch=3):
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(batch, 3, settings.image_size, settings.image_size, generator=generator)
    labels = None
    if settings.classes is not None:
        labels = torch.randint(settings.classes, (batch,), generator=generator)
    return sample, torch.tensor([0, settings.steps // 3, settings.steps - 1]), labels


def relative(a, b):
    return float((a - b).norm() / b.norm())


def predictions(settings, unet, state):
    sample, timesteps, labels = inputs(settings)
    with torch.no_grad():
        ours = unet(sample, timesteps, labels).sample
        return ours, Network(settings, state)(sample, network_time(settings, timesteps), labels)


@every_network
def test_the_network_predicts_as_there(repository, settings):
    state = random_state(settings)
    unet, _ = build(converted(settings, repository, state))
    assert relative(*predictions(settings, unet, state)) <= 1e-5
    assert unsupported(unet) is None


@pytest.mark.parametrize("settings", [GUIDED["resblock_updown and 32 channels a head"], IMPROVED["two heads"]])
@pytest.mark.parametrize("mutant", ["order of qkv", "heads"])
def test_a_wrong_order_or_head_width_is_no_rounding_error(settings, mutant):
    """The two mistakes that load without an error."""
    wrong = replace(settings, new_order=not settings.new_order)
    if mutant == "heads":
        wrong = replace(settings, heads=1, head_channels=settings.head_channels and 16)
    state = random_state(settings)
    unet, _ = build(converted(wrong, "guided-diffusion", state))
    assert relative(*predictions(settings, unet, state)) > 1e-3


def shapes_only(settings):
    return {name: torch.empty(shape, device="meta") for name, shape in network_shapes(settings).items()}


@every_network
@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_ten_steps_sample_as_there(repository, settings, engine):
    """Rising timesteps as the repositories space "ddim10"; x₀ is clipped in most steps."""
    state = random_state(settings)
    pipe = DDIMPipeline(*build(converted(settings, repository, state)))
    pipe.engine = engine
    start, _, labels = inputs(settings, batch=2)
    timesteps = list(range(0, settings.steps, settings.steps // 10))
    with torch.no_grad():
        theirs = ddim_samples(Network(settings, state), start, timesteps, labels)
        ours = pipe(latents=start, batch_size=2, class_labels=labels, timesteps=timesteps[::-1], output_type="latent")
    assert relative(ours.images, theirs) <= 1e-4


@pytest.mark.parametrize("mutant", [{"cosine": True}, {"steps": 900}, {"predict_xstart": True}, {"rescale": True}])
def test_another_schedule_gives_other_samples(mutant):
    settings = Settings(steps=500)
    state = random_state(settings)
    start, _, _ = inputs(settings, batch=2)
    timesteps = list(range(0, 500, 50))
    pipe = DDIMPipeline(*build(converted(replace(settings, **mutant), "guided-diffusion", state)))
    ours = pipe(latents=start, batch_size=2, timesteps=timesteps[::-1], output_type="latent").images
    with torch.no_grad():
        theirs = ddim_samples(Network(settings, state), start, timesteps)
    assert relative(ours, theirs) > 1e-2


@pytest.mark.parametrize("name", ["the new order of qkv", "learned, cosine, 4000 rescaled timesteps"])
def test_the_learned_variance_gives_their_ancestral_sampler(name):
    settings = GUIDED.get(name) or Settings(steps=4000, rescale=True, learn_sigma=True, cosine=True, head_channels=16)
    state = random_state(settings)
    pipe = DDIMPipeline(*build(converted(settings, "guided-diffusion", state)))
    start, _, _ = inputs(settings, batch=2)
    timesteps = list(range(0, settings.steps, settings.steps // 10))
    generator = torch.Generator().manual_seed(9)
    noises = [torch.randn(start.shape, generator=generator) for _ in timesteps]
    with torch.no_grad():
        theirs = ancestral_samples(Network(settings, state), start, timesteps, noises)
    said = {"latents": start, "eta": 1.0, "timesteps": timesteps[::-1], "output_type": "latent"}
    ours = pipe(**said, variance="learned_range", generator=torch.Generator().manual_seed(9)).images
    assert relative(ours, theirs) <= 1e-4
    # It is not what DDPM's fixed variance gives.
    assert relative(pipe(**said, generator=torch.Generator().manual_seed(9)).images, theirs) > 1e-3


def test_what_has_no_learned_variance_is_refused():
    state = random_state(GUIDED["one resolution"])
    pipe = DDIMPipeline(*build(converted(GUIDED["one resolution"], "guided-diffusion", state)))
    with pytest.raises(ValueError, match="the model predicts no variance"):
        pipe(eta=1.0, variance="learned_range")
    settings = GUIDED["the new order of qkv"]
    pipe = DDIMPipeline(*build(converted(settings, "guided-diffusion", random_state(settings))))
    with pytest.raises(ValueError, match=r"eta=0.0 adds no noise.*pass eta=1"):
        pipe(variance="learned_range")
    with pytest.raises(ValueError, match="variance must be 'learned_range' or None, got 'larger'"):
        pipe(eta=1.0, variance="larger")
