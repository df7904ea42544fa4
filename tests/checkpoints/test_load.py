"""Pipelines that diffusers saved, of any age and layout, load."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from parts import load_parts
from safetensors.torch import load_file, save_file

from ddim_fast.checkpoints import download, save_unet
from ddim_fast.once import log_once
from ddim_fast.scheduler import DDIMScheduler
from ddim_fast.unet import UNet2DModel

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def theirs(tiny_config):
    torch.manual_seed(1)
    return diffusers.UNet2DModel(**tiny_config).eval()


@pytest.fixture
def saved(theirs, tmp_path):
    """A DDPM pipeline, as diffusers saves it."""
    path = tmp_path / "saved"
    diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler(beta_end=0.01)).save_pretrained(path)
    return path


def predictions_agree(ours, theirs):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(ours(x, 7).sample, theirs(x, 7).sample, atol=1e-6, rtol=1e-5)


def edit_json(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("shards", [None, "4KB"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_pipeline_saved_by_diffusers_predicts_the_same(theirs, tmp_path, shards, safe, variant):
    pipe = diffusers.DDIMPipeline(theirs, diffusers.DDIMScheduler(beta_end=0.01, clip_sample=False))
    pipe.save_pretrained(tmp_path, safe_serialization=safe, variant=variant, max_shard_size=shards)

    unet, scheduler = load_parts(tmp_path, variant=variant)

    predictions_agree(unet, theirs)
    assert not unet.training and all(parameter.requires_grad for parameter in unet.parameters())
    assert isinstance(scheduler, DDIMScheduler)
    assert (scheduler.config.beta_end, scheduler.config.clip_sample) == (0.01, False)


@pytest.mark.parametrize("pipeline", ["DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "SomebodysOwnPipeline"])
@pytest.mark.parametrize("stored", ["DDPMScheduler", "PNDMScheduler", "DDIMScheduler"])
def test_any_pipeline_gives_what_diffusers_ddim_pipeline_would_sample_with(theirs, tmp_path, pipeline, stored):
    other = getattr(diffusers, stored)(beta_end=0.015, prediction_type="v_prediction")
    diffusers.DDPMPipeline(theirs, other).save_pretrained(tmp_path)
    expected = diffusers.DDIMPipeline.from_pretrained(tmp_path).scheduler
    edit_json(tmp_path / "model_index.json", _class_name=pipeline)

    _, scheduler = load_parts(tmp_path)

    for name in ("beta_end", "prediction_type", "set_alpha_to_one", "clip_sample", "steps_offset"):
        assert scheduler.config[name] == expected.config[name], name
    torch.testing.assert_close(scheduler.alphas_cumprod, expected.alphas_cumprod)


def test_components_may_have_other_names(saved, theirs):
    (saved / "unet").rename(saved / "net")
    (saved / "scheduler").rename(saved / "noise")
    index = {"_class_name": "Own", "net": ["diffusers", "UNet2DModel"], "noise": ["diffusers", "DDPMScheduler"]}
    (saved / "model_index.json").write_text(json.dumps(index))
    predictions_agree(load_parts(saved)[0], theirs)
    assert DDIMScheduler.from_pretrained(saved).config.beta_end == 0.01


@pytest.mark.parametrize("with_index", [True, False])
def test_flat_layout(saved, theirs, with_index):
    for file in [*(saved / "unet").iterdir(), *(saved / "scheduler").iterdir()]:
        file.rename(saved / file.name)
    (saved / "unet").rmdir()
    (saved / "scheduler").rmdir()
    if not with_index:
        (saved / "model_index.json").unlink()
    unet, scheduler = load_parts(saved)
    predictions_agree(unet, theirs)
    assert scheduler.config.beta_end == 0.01


def test_components_in_folders_win_over_flat_ones(saved, theirs, tiny_config):
    diffusers.UNet2DModel(**tiny_config).save_pretrained(saved)
    predictions_agree(load_parts(saved)[0], theirs)


def test_a_pipeline_in_a_subfolder(saved, theirs):
    predictions_agree(load_parts(saved.parent, subfolder="saved")[0], theirs)
    predictions_agree(UNet2DModel.from_pretrained(saved.parent, subfolder="saved/unet/"), theirs)


def test_unet_and_scheduler_load_from_their_own_folder_or_the_pipelines(saved, theirs):
    for path in (saved, saved / "unet"):
        predictions_agree(UNet2DModel.from_pretrained(path), theirs)
    for path in (saved, saved / "scheduler"):
        assert DDIMScheduler.from_pretrained(path).config.beta_end == 0.01


def test_from_pretrained_takes_config_entries(saved):
    assert UNet2DModel.from_pretrained(saved, dropout=0.25).config.dropout == 0.25
    assert DDIMScheduler.from_pretrained(saved, clip_sample=False).config.clip_sample is False
    with pytest.raises(TypeError, match="torch_dtyp: neither an option of from_pretrained nor"):
        UNet2DModel.from_pretrained(saved, torch_dtyp=torch.float16)


def test_weights_are_float32_on_the_cpu_unless_asked_otherwise(theirs, tmp_path):
    theirs.half().save_pretrained(tmp_path)
    assert {p.dtype for p in UNet2DModel.from_pretrained(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }
    assert {p.device.type for p in UNet2DModel.from_pretrained(tmp_path, device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("safe", [True, False])
def test_attention_weights_under_their_old_names(saved, theirs, safe):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = saved / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    assert any(".query." in key for key in state)
    path.unlink()
    if safe:
        save_file(state, path)
    else:
        torch.save(state, path.with_suffix(".bin"))
    predictions_agree(load_parts(saved)[0], theirs)


def test_config_and_names_of_the_first_release(saved, theirs):
    old = {
        "sample_size": "image_size",
        "layers_per_block": "num_res_blocks",
        "block_out_channels": "block_channels",
        "down_block_types": "down_blocks",
        "up_block_types": "up_blocks",
        "freq_shift": "downscale_freq_shift",
        "norm_num_groups": "resnet_num_groups",
        "norm_eps": "resnet_eps",
        "act_fn": "resnet_act_fn",
        "attention_head_dim": "num_head_channels",
    }
    config = json.loads((saved / "unet/config.json").read_text())
    config = {old.get(name, name): value for name, value in config.items()} | {"_class_name": "UNetUnconditionalModel"}
    config["down_blocks"] = [f"UNetRes{kind}" for kind in config["down_blocks"]]
    (saved / "unet/config.json").write_text(json.dumps(config))
    path = saved / "unet/diffusion_pytorch_model.safetensors"
    top = {"mid_block": "mid", "down_blocks": "downsample_blocks", "up_blocks": "upsample_blocks"}
    state = {}
    for name, tensor in load_file(path).items():
        first, _, rest = name.partition(".")
        state[f"{top.get(first, first)}.{rest}"] = tensor
        if "downsamplers.0.conv." in name:
            state[f"{top[first]}.{rest}".replace(".conv.", ".op.")] = tensor.clone()
    save_file(state, path)
    edit_json(saved / "scheduler/scheduler_config.json", timesteps=1000, tensor_format="pt")
    edit_json(saved / "model_index.json", unet=["diffusers", "UNetUnconditionalModel"])

    unet, scheduler = load_parts(saved)

    predictions_agree(unet, theirs)
    assert unet.config.layers_per_block == 1 and unet.config["_class_name"] == "UNet2DModel"
    assert scheduler.config.num_train_timesteps == 1000


def test_safetensors_come_before_bin_and_an_index_before_one_file(theirs, tmp_path, tiny_config):
    worse = diffusers.UNet2DModel(**tiny_config)
    worse.save_pretrained(tmp_path, safe_serialization=False)
    theirs.save_pretrained(tmp_path)
    predictions_agree(UNet2DModel.from_pretrained(tmp_path), theirs)
    predictions_agree(UNet2DModel.from_pretrained(tmp_path, use_safetensors=False), worse)
    best = diffusers.UNet2DModel(**tiny_config)
    best.save_pretrained(tmp_path, max_shard_size="4KB")
    predictions_agree(UNet2DModel.from_pretrained(tmp_path), best)
    predictions_agree(diffusers.UNet2DModel.from_pretrained(tmp_path), best)


@pytest.mark.parametrize("shared", [False, True])
def test_links_as_the_hubs_cache_makes_them_are_followed(saved, theirs, tmp_path, shared):
    """The files of a snapshot link to blobs of their repository, which may link to blobs of all repositories."""
    repository = tmp_path / "hub" / "models--me--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.parent.mkdir(parents=True)
    saved.rename(snapshot)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = repository / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
        if shared:
            common = tmp_path / "hub" / "blobs" / "ab" / f"ab{number:062x}"
            common.parent.mkdir(parents=True, exist_ok=True)
            blob.rename(common)
            blob.symlink_to(os.path.relpath(common, blob.parent))
    predictions_agree(load_parts(snapshot)[0], theirs)
    predictions_agree(UNet2DModel.from_pretrained(snapshot / "unet"), theirs)


def test_other_components_are_named_and_left_alone(saved, theirs, caplog):
    log_once.cache_clear()
    edit_json(saved / "model_index.json", vae=["diffusers", "AutoencoderKL"], safety_checker=[None, None])
    with caplog.at_level(logging.WARNING):
        predictions_agree(load_parts(saved)[0], theirs)
    assert "not vae" in caplog.text and "safety_checker" not in caplog.text


def test_buffers_that_no_file_holds_are_real(tmp_path, tiny_config):
    """NCSN++ blocks resample with fixed filters, which are not in the weights."""
    config = {
        **tiny_config,
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 64),
        "time_embedding_type": "fourier",
        "center_input_sample": True,
        "in_channels": 3,
        "out_channels": 3,
    }
    theirs = diffusers.UNet2DModel(**config).eval()
    theirs.save_pretrained(tmp_path)
    unet = UNet2DModel.from_pretrained(tmp_path)
    assert not any(tensor.is_meta for tensor in [*unet.parameters(), *unet.buffers()])
    x, sigma = torch.randn(1, 3, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, sigma).sample, theirs(x, sigma).sample, atol=1e-5, rtol=1e-4)


def test_loading_draws_no_random_numbers_and_leaves_module_building_alone(saved):
    torch.manual_seed(5)
    load_parts(saved)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert not torch.nn.Linear(2, 2).weight.is_meta


def extra_memory(load):
    """How much the resident memory of a fresh process grows, at its peak, while weights are loaded and read: KiB."""

    def status(name):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

    read, write = os.pipe()
    if os.fork() == 0:
        torch.set_num_threads(1)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        unet = load()
        sum(float(parameter.detach().sum()) for parameter in unet.parameters())
        os.write(write, str(status("VmHWM") - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(read, 99))


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads peak memory from Linux's /proc")
def test_weights_take_memory_once(tmp_path, tiny_config):
    large = UNet2DModel(**{**tiny_config, "block_out_channels": (192, 192)})
    size = sum(parameter.numel() * 4 for parameter in large.parameters()) / 1024
    save_unet(large, tmp_path)
    assert size > 20_000
    assert extra_memory(lambda: UNet2DModel.from_pretrained(tmp_path)) < 1.4 * size
    # The file's pages, which the system can drop at any time, and the float64 copy.
    assert extra_memory(lambda: UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64)) < 3.4 * size


def test_download_of_a_folder_is_the_folder(saved):
    assert download(saved) == saved


def test_what_exists_here_wins_over_the_bundled_model(theirs, tmp_path, monkeypatch):
    diffusers.DDIMPipeline(theirs, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "ddim-fast/digits")
    monkeypatch.chdir(tmp_path)
    predictions_agree(load_parts("ddim-fast/digits")[0], theirs)


def test_a_bundled_model_loads_without_a_network(saved, theirs, tmp_path, monkeypatch):
    from ddim_fast.checkpoints import source

    saved.rename(tmp_path / "digits")
    monkeypatch.setattr(source, "BUNDLED", tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: pytest.fail("asked the Hub"))
    predictions_agree(load_parts("ddim-fast/digits")[0], theirs)
    assert download("ddim-fast/digits") == tmp_path / "digits"
