"""`ddim-fast convert` and `ddim-fast info` on checkpoints of other repositories and of diffusers' training script."""

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch

import ddim_fast
from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.cli import main
from ddim_fast.convert import SCHEDULER_ENTRIES, in_options

sys.path.insert(0, str(Path(__file__).parent / "checkpoints"))

import guided_diffusion_reference as adm
import original_reference as original

diffusers = pytest.importorskip("diffusers")

ADM = adm.Settings(learn_sigma=True, head_channels=16)
ADM_FLAGS = (
    "--image_size 16 --channel_mult 1,2 --num_channels 32 --num_res_blocks 1 --attention_resolutions 8 "
    "--num_head_channels 16 --learn_sigma True"
)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


@pytest.fixture
def ema_file(tmp_path):
    path = tmp_path / "ema_0.9999_100.pt"
    torch.save(adm.random_state(ADM), path)
    return path


def samples(pipe, **options):
    start = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return pipe(latents=start, num_inference_steps=4, output_type="latent", **options).images


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_a_converted_folder_samples_here_and_in_diffusers(ema_file, tmp_path, run):
    out = tmp_path / "out"
    code, said, _ = run("convert", ema_file, "--flags", ADM_FLAGS, "--out", out)
    assert code == 0 and "a network of guided-diffusion" in said and ADM_FLAGS in said
    with torch.no_grad():
        start = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        theirs = adm.ddim_samples(adm.Network(ADM, adm.random_state(ADM)), start, [0, 250, 500, 750])
    pipe = DDIMPipeline.from_pretrained(out)
    assert pipe.unet.config.out_channels == 3
    assert relative(samples(pipe), theirs) <= 1e-4
    peer = diffusers.DDIMPipeline.from_pretrained(out)
    peer.scheduler.set_timesteps(4)
    sample = start
    with torch.no_grad():
        for t in peer.scheduler.timesteps:
            output = peer.unet(sample, t).sample
            sample = peer.scheduler.step(output, t, sample, use_clipped_model_output=True).prev_sample
    assert relative(sample, theirs) <= 1e-4


def test_the_card_names_source_flags_and_how_to_sample(ema_file, tmp_path, run):
    run("convert", ema_file, "--flags", ADM_FLAGS, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`ema_0.9999_100.pt`" in card and ADM_FLAGS in card and str(tmp_path) not in card
    assert "SHA-256" in card and "use_clipped_model_output=True" in card and "Assumed: nothing" in card


def test_six_channels_where_they_are_asked_for(ema_file, tmp_path, run):
    out = tmp_path / "out"
    assert run("convert", ema_file, "--flags", ADM_FLAGS, "--out-channels", 6, "--out", out)[0] == 0
    config = json.loads((out / "unet" / "config.json").read_text())
    assert config["out_channels"] == 6
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["variance_type"] == "learned_range"
    three = DDIMPipeline.from_pretrained(ema_file, flags=ADM_FLAGS, out_channels=3)
    assert relative(samples(DDIMPipeline.from_pretrained(out)), samples(three)) <= 1e-6


def test_several_head_widths_are_written_with_a_warning(tmp_path, run, caplog):
    settings = adm.Settings(attention=(16, 8))
    torch.save(adm.random_state(settings), tmp_path / "model.pt")
    flags = "--image_size 16 --channel_mult 1,2 --num_channels 32 --num_res_blocks 1 --attention_resolutions 16,8"
    code, said, _ = run("convert", tmp_path / "model.pt", "--flags", flags, "--out", tmp_path / "out")
    assert code == 0 and "diffusers cannot load it" in said
    assert "attention_head_dim=(8, 16) has several widths" in caplog.text
    assert "diffusers cannot load it" in (tmp_path / "out" / "README.md").read_text()
    assert DDIMPipeline.from_pretrained(tmp_path / "out").unet.config.attention_head_dim == [8, 16]


def test_the_original_s_checkpoint_with_what_is_given(tmp_path, run):
    torch.save(original.random_state(original.Settings()), tmp_path / "ckpt.pth")
    code, said, _ = run("info", tmp_path / "ckpt.pth", "--size", 64, "--beta-end", 0.01)
    assert code == 0 and "a network of the original DDIM repository" in said
    assert "size = 64" in said and "beta_end = 0.01" in said and "64x64" in said
    assert "assumed      beta_schedule linear, beta_start 0.0001, num_train_timesteps 1000" in said
    out = tmp_path / "out"
    assert run("convert", tmp_path / "ckpt.pth", "--size", 64, "--no-set-alpha-to-one", "--out", out)[0] == 0
    pipe = DDIMPipeline.from_pretrained(out)
    assert pipe.unet.config.sample_size == 64 and pipe.scheduler.config.set_alpha_to_one is False
    assert "Assumed: beta_schedule linear" in (out / "README.md").read_text()


def test_errors_speak_the_command_line(ema_file, tmp_path, run):
    code, _, error = run("convert", ema_file, "--out", tmp_path / "out")
    assert code == 2 and "--flags " in error and "flags=" not in error and not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    code, _, error = run("convert", ema_file, "--flags", ADM_FLAGS, "--out", tmp_path / "full")
    assert code == 2 and "not an empty folder" in error
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    code, _, error = run("info", "--size", 3)
    assert code == 2 and "--size is about a MODEL" in error
    assert in_options("give size= or config='x', beta_end=3") == "give --size or --config 'x', --beta-end 3"


@pytest.fixture
def training_run(tmp_path):
    """What diffusers' training script leaves: the run's pipeline, and checkpoints with a moving average."""
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    unet = diffusers.UNet2DModel(**config)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=500, beta_schedule="squaredcos_cap_v2")
    run = tmp_path / "run"
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(run)
    from diffusers.training_utils import EMAModel

    average = EMAModel(unet.parameters(), model_cls=diffusers.UNet2DModel, model_config=unet.config)
    average.shadow_params = [parameter.detach() * 2 for parameter in average.shadow_params]
    average.save_pretrained(run / "checkpoint-500" / "unet_ema")
    unet.save_pretrained(run / "checkpoint-500" / "unet")
    unet.save_pretrained(run / "checkpoint-500" / "unet", variant="fp16")
    return run, unet


def test_the_moving_average_of_a_training_run(training_run, tmp_path, run, caplog):
    folder, unet = training_run
    out = tmp_path / "out"
    code, _, _ = run("convert", folder, "--subfolder", "checkpoint-500/unet_ema", "--out", out)
    assert code == 0 and "does not use these config entries" not in caplog.text
    pipe = DDIMPipeline.from_pretrained(out)
    assert torch.equal(pipe.unet.conv_in.weight, unet.conv_in.weight * 2)
    assert "decay" not in pipe.unet.config
    assert (len(pipe.scheduler), pipe.scheduler.config.beta_schedule) == (500, "squaredcos_cap_v2")


def test_a_checkpoint_alone_asks_for_the_noise_schedule(training_run, tmp_path, run):
    folder, _ = training_run
    checkpoint = folder / "checkpoint-500"
    code, _, error = run("convert", checkpoint, "--subfolder", "unet_ema", "--out", tmp_path / "out")
    assert code == 2 and "no scheduler" in error and "--num-train-timesteps" in error
    schedule = ("--num-train-timesteps", 500, "--beta-schedule", "squaredcos_cap_v2")
    code, _, _ = run("convert", checkpoint, "--subfolder", "unet_ema", *schedule, "--out", tmp_path / "out")
    assert code == 0 and len(DDIMPipeline.from_pretrained(tmp_path / "out").scheduler) == 500
    code, said, _ = run("info", checkpoint, "--subfolder", "unet", "--variant", "fp16", *schedule)
    assert code == 0 and "8x8" in said


def test_every_entry_of_the_scheduler_has_its_option():
    entries = inspect.signature(DDIMScheduler.__init__).parameters
    assert list(SCHEDULER_ENTRIES) == [name for name in entries if name != "self"]


def test_from_pretrained_takes_the_same_arguments(ema_file):
    pipe = DDIMPipeline.from_pretrained(ema_file, flags=ADM_FLAGS)
    assert pipe.unet.config.out_channels == 6 and pipe.scheduler.config.use_clipped_model_output
    assert UNet2DModel.from_pretrained(ema_file, flags=ADM_FLAGS, out_channels=3).config.out_channels == 3
    assert DDIMScheduler.from_pretrained(ema_file, flags=ADM_FLAGS, beta_end=0.5).config.beta_end == 0.5
    with pytest.raises(ValueError, match=r"config='cifar10' says nothing about .*; give flags="):
        DDIMPipeline.from_pretrained(ema_file, config="cifar10")


def test_generate_takes_the_same_words_and_no_folder(ema_file, training_run, tmp_path, run):
    said = ("--seeds", "0-1", "--steps", 2, "--format", "npz")
    code, _, error = run("generate", ema_file, "--flags", ADM_FLAGS, *said, "--out", tmp_path / "a")
    assert code == 0, error
    code, _, error = run(
        "generate", training_run[0], "--subfolder", "checkpoint-500/unet_ema", *said, "--out", tmp_path / "b"
    )
    assert code == 0, error
    code, _, error = run("generate", ema_file, *said, "--out", tmp_path / "c")
    assert code == 2 and "--flags " in error and "flags=" not in error
    with pytest.raises(ValueError, match="does not reach the workers of ray='local'; write a folder"):
        ddim_fast.generate(ema_file, "0-1", tmp_path / "d", loading={"flags": ADM_FLAGS}, ray="local")
