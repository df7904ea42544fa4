"""Checkpoints of the original DDIM repository give the network and the noise they were trained with."""

import argparse
import logging
import math
from dataclasses import replace

import pytest
import torch
import yaml
from original_reference import Network, Settings, betas, generalized_steps, network_shapes, random_state
from parts import load_parts
from safetensors.torch import save_file

from ddim_fast.checkpoints import Training, recognize, save_pipeline
from ddim_fast.pipeline import DDIMPipeline
from ddim_fast.scheduler import DDIMScheduler
from ddim_fast.unet import UNet2DModel

SMALL = Settings()
TRAINED = {
    "like CIFAR-10": SMALL,
    "64 pixels with attention at 32": Settings(image_size=64, ch_mult=(1, 2), attn_resolutions=(32,)),
    "attention at two resolutions": Settings(image_size=16, attn_resolutions=(16, 8)),
    "attention in the middle alone": Settings(image_size=16, attn_resolutions=(64,)),
    "two residual blocks, βs linear in their root": Settings(image_size=16, num_res_blocks=2, beta_schedule="quad"),
    "one channel and 400 timesteps": Settings(image_size=16, in_channels=1, ch_mult=(1, 3), steps=400),
    "a wide, constant β": Settings(image_size=16, ch=64, ch_mult=(1, 1), beta_schedule="const", beta_end=0.01),
    "βs of a sigmoid": Settings(image_size=16, ch_mult=(1, 2, 2, 4), beta_schedule="sigmoid", beta_end=0.03),
    "βs 1/T to 1": Settings(image_size=16, ch_mult=(1, 2), beta_schedule="jsd", steps=100),
}
every_network = pytest.mark.parametrize("settings", TRAINED.values(), ids=TRAINED)


def write(folder, settings, state=None, config=True):
    """A checkpoint, and beside it the config as the repository's training writes it."""
    torch.save(random_state(settings) if state is None else state, folder / "ckpt.pth")
    if config:
        (folder / "config.yml").write_text(yaml.dump(_namespace(settings.sections()), default_flow_style=False))
    return folder / "ckpt.pth"


def _namespace(value):
    if not isinstance(value, dict):
        return value
    return argparse.Namespace(**{name: _namespace(entry) for name, entry in value.items()})


def relative(a, b):
    return float((a - b).norm() / b.norm())


def inputs(settings):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, settings.in_channels, settings.image_size, settings.image_size, generator=generator)


def predicts_as(unet, settings, state):
    x, t = inputs(settings), torch.tensor([3, settings.steps - 9])
    with torch.no_grad():
        return relative(unet(x, t).sample, Network(settings, state)(x, t))


@every_network
def test_the_network_predicts_as_the_original_one(settings, tmp_path):
    unet, scheduler = load_parts(write(tmp_path, settings))
    assert predicts_as(unet, settings, random_state(settings)) <= 1e-5
    assert unet.config.sample_size == settings.image_size and not unet.training
    assert unet.config.dropout == settings.dropout
    assert scheduler.config.clip_sample is False and len(scheduler) == settings.steps
    prods = (1 - betas(settings)).cumprod(0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), prods, atol=1e-6, rtol=1e-4)


@every_network
@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_ten_steps_sample_as_there(settings, engine, tmp_path):
    pipe = DDIMPipeline.from_pretrained(write(tmp_path, settings))
    pipe.engine = engine
    start, timesteps = inputs(settings), list(range(0, settings.steps, settings.steps // 10))
    with torch.no_grad():
        theirs = generalized_steps(Network(settings, random_state(settings)), start, timesteps)
    ours = pipe(latents=start, batch_size=2, num_inference_steps=10, output_type="latent").images
    assert relative(ours, theirs) <= 1e-4


@pytest.mark.parametrize("mutant", [{"beta_end": 0.01}, {"beta_schedule": "quad"}, {"steps": 900}])
def test_another_schedule_gives_other_samples(mutant, tmp_path):
    settings = TRAINED["attention at two resolutions"]
    path = write(tmp_path, replace(settings, **mutant))
    start = inputs(settings)
    with torch.no_grad():
        theirs = generalized_steps(Network(settings, random_state(settings)), start, list(range(0, 1000, 100)))
    pipe = DDIMPipeline.from_pretrained(path)
    timesteps = [t * len(pipe.scheduler) // 1000 for t in range(900, -1, -100)]
    ours = pipe(latents=start, batch_size=2, timesteps=timesteps, output_type="latent").images
    assert relative(ours, theirs) > 1e-3


def test_every_way_of_loading_takes_the_file(tmp_path):
    path, state = tmp_path / "model.safetensors", random_state(SMALL)
    save_file(state, path)
    assert predicts_as(UNet2DModel.from_pretrained(path), SMALL, state) <= 1e-5
    assert DDIMScheduler.from_pretrained(path).config == load_parts(path)[1].config
    assert load_parts(path, torch_dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kept_average", [True, False])
def test_training_states_give_the_moving_average_if_there_is_one(kept_average, tmp_path):
    state = random_state(SMALL)
    model = {f"module.{name}": tensor / 2 for name, tensor in state.items()}
    states = [model, {"state": {}, "param_groups": [{"lr": 2e-4}]}, 100, 5000, *([state] if kept_average else [])]
    expected = state if kept_average else {name: tensor / 2 for name, tensor in state.items()}
    unet = load_parts(write(tmp_path, SMALL, states))[0]
    assert predicts_as(unet, SMALL, expected) <= 1e-5


def test_a_converted_network_saves_as_an_ordinary_pipeline(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    save_pipeline(*load_parts(write(tmp_path, SMALL)), tmp_path / "pipe")
    unet = diffusers.DDIMPipeline.from_pretrained(tmp_path / "pipe").unet
    assert predicts_as(unet, SMALL, random_state(SMALL)) <= 1e-5


@pytest.mark.parametrize(
    ("config", "size", "multipliers", "parameters"),
    [
        ("cifar10", 32, (1, 2, 2, 2), 35_746_307),
        ("celeba", 64, (1, 2, 2, 2, 4), 78_700_803),
        ("bedroom", 256, (1, 1, 2, 2, 4, 4), 113_673_219),
        ("church", 256, (1, 1, 2, 2, 4, 4), 113_673_219),
    ],
)
def test_the_released_networks_are_recognized(tmp_path, config, size, multipliers, parameters):
    shapes = network_shapes(Settings(image_size=size, ch=128, ch_mult=multipliers, num_res_blocks=2))
    assert sum(map(math.prod, shapes.values())) == parameters
    # Zeros that share one number: hundreds of megabytes would say no more.
    path = write(tmp_path, SMALL, {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, config=False)
    told, guessed = recognize(path, Training(config=config)), recognize(path)
    assert told.unet["sample_size"] == guessed.unet["sample_size"] == size
    assert not told.assumed
    assert any(config in guess and f"{size} x {size}" in guess for guess in guessed.assumed)
    with torch.device("meta"):
        assert UNet2DModel.from_config(told.unet).num_parameters() == parameters
    wrong = "celeba" if config != "celeba" else "cifar10"
    with pytest.raises(ValueError, match=rf"is not a {wrong} network: found channels \(128, .* expected \(128,"):
        recognize(path, Training(config=wrong))


def test_what_the_tensors_do_not_show_is_warned_about_and_named(tmp_path, caplog):
    path = write(tmp_path, SMALL, config=False)
    with caplog.at_level(logging.WARNING):
        load_parts(path)
    assert "images of 32 x 32 pixels" in caplog.text and "give size= or config=" in caplog.text
    assert "beta_schedule linear, beta_start 0.0001, beta_end 0.02, num_train_timesteps 1000" in caplog.text
    said = {"size": 64, "beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        unet, scheduler = load_parts(path, **said)
    assert "assumed num_train_timesteps 1000, as" in caplog.text and "images of" not in caplog.text
    assert unet.config.sample_size == 64 and scheduler.config.beta_end == 0.01
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_parts(path, **said, num_train_timesteps=500)
    assert not caplog.text


def test_a_config_beside_the_checkpoint_is_read_and_what_is_given_wins(tmp_path, caplog):
    settings = Settings(image_size=64, attn_resolutions=(32,), steps=500)
    path = write(tmp_path, settings)
    with caplog.at_level(logging.WARNING):
        unet, scheduler = load_parts(path)
    assert (unet.config.sample_size, len(scheduler)) == (64, 500) and not caplog.text
    unet, scheduler = load_parts(path, size=128, num_train_timesteps=100, beta_end=0.5)
    assert (unet.config.sample_size, len(scheduler), scheduler.config.beta_end) == (128, 100, 0.5)
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(replace(settings, beta_end=0.03).sections()))
    assert DDIMScheduler.from_pretrained(path, config=own).config.beta_end == 0.03
    assert UNet2DModel.from_pretrained(path, size=32).config.sample_size == 32
    # A schedule that is given replaces βs that the config lists.
    path = write(tmp_path, replace(settings, beta_schedule="const"))
    assert load_parts(path)[1].config.trained_betas is not None
    assert load_parts(path, beta_schedule="linear")[1].config.trained_betas is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("model", "ch_mult", [1, 2]), r"found channels \(32, 64, 64\), expected \(32, 64\)"),
        (("model", "ch_mult", [1, True]), "model.ch_mult must be a list of positive integers"),
        (("model", "num_res_blocks", 2), "model.num_res_blocks 2, but the tensors have 1"),
        (("model", "in_channels", 1), "model.in_channels 1, but the tensors have 3"),
        (("data", "image_size", 64), r"attention at resolutions \[2\].*, but the tensors have \[1\]"),
        (("data", "image_size", "32"), "data.image_size must be an integer, found '32'"),
        (("data", "image_size", 10**30), "data.image_size must be a positive integer below"),
        (("data", "image_size", -32), "data.image_size must be a positive integer below"),
        (("model", "type", "bayesian"), "model.type is 'bayesian'"),
        (("model", "resamp_with_conv", False), "model.resamp_with_conv is False"),
        (("data", "logit_transform", True), "data.logit_transform False"),
        (("data", "rescaled", False), "data.rescaled must be True"),
        (("diffusion", "beta_schedule", "cosine"), "beta_schedule must be quad, linear, const, jsd or sigmoid"),
        (("diffusion", "beta_end", float("nan")), "diffusion.beta_end must be a number, found nan"),
        (("diffusion", "num_diffusion_timesteps", None), "num_diffusion_timesteps must be an integer, found None"),
    ],
)
def test_a_config_that_contradicts_the_file_or_cannot_be_expressed_is_refused(tmp_path, change, message):
    section, name, value = change
    sections = SMALL.sections()
    sections[section][name] = value
    path = write(tmp_path, SMALL, config=False)
    (tmp_path / "own.yml").write_text(yaml.safe_dump(sections))
    with pytest.raises(ValueError, match=message):
        recognize(path, Training(config=tmp_path / "own.yml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("just words", "data.image_size must be an integer, found None|model.type must be"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "YAML aliases"),
        ("x" * 200_000, "200000 bytes"),
        ("- " * 5000, "is not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    path = write(tmp_path, SMALL, config=False)
    (tmp_path / "own.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        recognize(path, Training(config=tmp_path / "own.yml"))


def test_nothing_in_a_config_is_run(tmp_path):
    path = write(tmp_path, SMALL, config=False)
    marker = tmp_path / "ran"
    text = yaml.safe_dump(SMALL.sections()) + f"evil: !!python/object/apply:os.mkdir ['{marker}']\n"
    (tmp_path / "config.yml").write_text(text)
    assert recognize(path).unet["sample_size"] == 32
    assert not marker.exists()


def test_another_program_s_config_beside_the_file_is_named_and_not_used(tmp_path, caplog):
    path = write(tmp_path, SMALL, config=False)
    (tmp_path / "config.yml").write_text("trainer: {lr: 0.1}\n")
    with caplog.at_level(logging.WARNING):
        load_parts(path)
    assert "config.yml is not used: it has no sections data, model and diffusion" in caplog.text


def test_other_files_are_refused_with_a_hint(tmp_path):
    def refused(state, message, **said):
        with pytest.raises(ValueError, match=message):
            load_parts(write(tmp_path, SMALL, state, config=False), **said)

    state = random_state(SMALL)
    refused(
        {"conv_in.weight": torch.zeros(1), "down_blocks.0.x": torch.zeros(1)},
        r"ckpt.pth is not a network of the original .*'conv_in.weight'.*give the folder",
    )
    refused({"epoch": 3}, r"must hold a network .* found a dict with the entries 'epoch'")
    refused({"state": {}, "param_groups": []}, "is an optimizer's state")
    refused(state, "config='cifar' must be 'auto' or one of 'cifar10'", config="cifar")
    refused(state, "flags='--x 1' says nothing about .*original DDIM repository; give config=", flags="--x 1")
    refused(state, "size must be a multiple of 4, since the network halves it 2 times; got 30", size=30)
    refused(state, "null_label=3, but the network has no classes", null_label=3)
    refused(random_state(Settings(attn_resolutions=(16, 8))), "attention at 2 resolutions; .* give size= or config=")
    refused(
        {name: tensor for name, tensor in state.items() if "sample.conv" not in name}, "resamp_with_conv was False"
    )
    refused(state | {"logvar": torch.zeros(1000)}, "model.type was 'bayesian'")
    refused({k: v for k, v in state.items() if k != "conv_in.weight"}, "conv_in.weight is missing")
    refused(state | {"stray": torch.zeros(1)}, "unexpected: stray")
    refused(
        {k: v for k, v in state.items() if k != "mid.block_2.conv2.bias"}, r"missing: mid_block.resnets.1.conv2.bias"
    )
    wide = {name: torch.empty(shape) for name, shape in network_shapes(Settings(ch_mult=(2, 2))).items()}
    refused(wide, "ch_mult must start with 1")


def test_a_folder_has_its_configs_and_takes_no_training(tmp_path, unet, scheduler):
    save_pipeline(unet, scheduler, tmp_path)
    with pytest.raises(ValueError, match=r"flags='--x 1' is for checkpoint files .*has a config.json"):
        load_parts(tmp_path, flags="--x 1")
    assert DDIMPipeline.from_pretrained(tmp_path, beta_end=0.5).scheduler.config.beta_end == 0.5
    with pytest.raises(ValueError, match="scheduler is given, and beta_end with it"):
        DDIMPipeline.from_pretrained(tmp_path, scheduler=scheduler, beta_end=0.5)
