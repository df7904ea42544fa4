"""The options that diffusers' `from_pretrained` takes are taken here: honoured, or said to have no effect."""

import inspect
import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.checkpoints.options import WITHOUT_EFFECT
from ddim_fast.once import log_once

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BOTH = pytest.mark.parametrize("kind", [DDIMPipeline, UNet2DModel])


@pytest.fixture
def folder(unet, scheduler, tmp_path):
    DDIMPipeline(unet, scheduler).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def said(caplog):
    log_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


def options_of_diffusers(kind):
    """The names that a `from_pretrained` of the installed diffusers takes out of its options."""
    return set(re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(kind.from_pretrained)))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(DDIMPipeline, diffusers.DDIMPipeline), (UNet2DModel, diffusers.UNet2DModel)],
)
def test_every_option_of_diffusers_is_an_argument_or_said_to_have_no_effect(ours, theirs):
    known = inspect.signature(ours.from_pretrained).parameters
    names = options_of_diffusers(theirs)
    assert len(names) > 15
    assert not names - set(known) - set(WITHOUT_EFFECT)


@BOTH
@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_an_option_without_effect_is_named_with_the_reason(folder, unet, same_weights, said, kind, name):
    loaded = kind.from_pretrained(folder, **{name: True})
    same_weights(loaded if kind is UNet2DModel else loaded.unet, unet)
    if name not in ("low_cpu_mem_usage", "disable_mmap", "resume_download"):
        assert f"{name} has no effect: {WITHOUT_EFFECT[name]}" in said.text
    said.clear()
    kind.from_pretrained(folder, **{name: None})
    assert not said.text


def test_parts_of_other_pipelines_and_slips_are_named(folder, said):
    DDIMPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False, varient="fp16")
    assert "safety_checker has no effect on a DDIMPipeline" in said.text
    assert "varient has no effect on a DDIMPipeline; did you mean variant?" in said.text
    with pytest.raises(TypeError, match="varient: neither an option of from_pretrained nor an entry"):
        UNet2DModel.from_pretrained(folder, varient="fp16")


@BOTH
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, {"unet": torch.bfloat16}, {"default": torch.bfloat16}])
def test_both_names_of_dtype_and_a_dict_of_parts(folder, kind, name, value):
    assert kind.from_pretrained(folder, **{name: value}).dtype == torch.bfloat16


@BOTH
def test_a_dict_of_other_parts_leaves_the_network_as_it_is_and_says_so(folder, said, kind):
    assert kind.from_pretrained(folder, torch_dtype={"vae": torch.bfloat16}).dtype == torch.float32
    assert "['vae']" in said.text


@BOTH
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_auto_is_the_dtype_of_the_file(folder, unet, kind, stored):
    unet.to(stored).save_pretrained(folder / "unet")
    assert kind.from_pretrained(folder, dtype="auto").dtype == stored
    assert kind.from_pretrained(folder).dtype == torch.float32


def test_auto_of_a_mixed_file_loses_nothing(folder):
    state = load_file(folder / WEIGHTS)
    save_file({name: t.half() if "conv" in name else t for name, t in state.items()}, folder / "new")
    (folder / "new").replace(folder / WEIGHTS)
    assert UNet2DModel.from_pretrained(folder, torch_dtype="auto").dtype == torch.float32


@BOTH
def test_two_names_with_two_values_are_refused(folder, kind):
    with pytest.raises(ValueError, match=r"dtype=torch.float16 and torch_dtype=torch.bfloat16 are two names"):
        kind.from_pretrained(folder, dtype=torch.float16, torch_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="device='cpu' and device_map='meta' name two devices"):
        kind.from_pretrained(folder, device="cpu", device_map="meta")
    with pytest.warns(FutureWarning, match="pass token"), pytest.raises(ValueError, match="token alone"):
        kind.from_pretrained(folder, token="a", use_auth_token="b")


@BOTH
@pytest.mark.parametrize(
    "device_map",
    ["meta", torch.device("meta"), {"": "meta"}, {"unet": "meta"}, {"conv_in": "meta", "mid_block": "meta"}],
)
def test_a_device_map_names_the_device(folder, kind, device_map):
    assert kind.from_pretrained(folder, device_map=device_map).device.type == "meta"


@BOTH
@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_ways_to_share_out_take_the_accelerator_if_there_is_one(folder, kind, device_map):
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert kind.from_pretrained(folder, device_map=device_map).device.type == expected


@BOTH
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a card")
@pytest.mark.parametrize("options", [{"device_map": "cuda"}, {"device_map": 0}, {"device": "cuda:1"}])
def test_a_card_that_is_not_there_is_refused_in_words(folder, kind, options):
    with pytest.raises(ValueError, match="0 CUDA devices"):
        kind.from_pretrained(folder, **options)


@BOTH
@pytest.mark.parametrize(
    ("device_map", "error"),
    [
        ("gpu please", "device_map='gpu please' must be a device"),
        (-1, "device_map=-1 is no device"),
        (True, "device_map must be a device"),
        ([0], "device_map must be a device"),
        ({"conv_in": "cpu", "mid_block": "meta"}, "must name one device"),
        ({}, "must name one device"),
    ],
)
def test_a_device_map_that_is_none_is_refused(folder, kind, device_map, error):
    with pytest.raises((TypeError, ValueError), match=error):
        kind.from_pretrained(folder, device_map=device_map)


@pytest.mark.parametrize("kind", [DDIMPipeline, UNet2DModel, DDIMScheduler])
def test_the_former_name_of_token_is_taken(folder, kind):
    kind.from_pretrained(folder, use_auth_token=None)
    with pytest.warns(FutureWarning, match="use_auth_token is deprecated; pass token"):
        kind.from_pretrained(folder, use_auth_token="secret")


def test_loading_info_comes_with_the_network(folder, unet, same_weights, said):
    loaded, info = UNet2DModel.from_pretrained(folder, output_loading_info=True)
    same_weights(loaded, unet)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    assert isinstance(DDIMPipeline.from_pretrained(folder, output_loading_info=True), DDIMPipeline)
    assert "output_loading_info has no effect on a pipeline" in said.text


def test_mismatched_sizes_keep_initial_values_if_asked(folder, unet, said):
    with pytest.raises(ValueError, match=r"conv_in.weight"):
        UNet2DModel.from_pretrained(folder, in_channels=4)
    wide, info = UNet2DModel.from_pretrained(
        folder, in_channels=4, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert info["mismatched_keys"] == [("conv_in.weight", (8, 1, 3, 3), (8, 4, 3, 3))]
    assert "conv_in.weight" in said.text
    assert wide.conv_in.weight.std() > 0 and not wide.conv_in.weight.is_meta
    assert torch.equal(wide.conv_out.weight, unet.conv_out.weight)


def test_unused_options_come_back_from_a_scheduler_if_asked(folder):
    scheduler, unused = DDIMScheduler.from_pretrained(folder, return_unused_kwargs=True, mine=3, clip_sample=True)
    assert unused == {"mine": 3} and scheduler.config.clip_sample is True and "mine" not in scheduler.config
    with pytest.raises(TypeError, match="mine: neither an option"):
        DDIMScheduler.from_pretrained(folder, mine=3)


def test_parts_that_are_given_are_taken_and_the_rest_is_loaded(folder, unet, same_weights, said):
    own, noise = UNet2DModel.from_config(unet.config), DDIMScheduler(beta_end=0.03)
    pipe = DDIMPipeline.from_pretrained(folder, unet=own, torch_dtype=torch.float16)
    assert pipe.unet is own and own.dtype == torch.float32 and pipe.scheduler.config.steps_offset == 1
    assert "torch_dtype: no effect on the unet that was given" in said.text
    (folder / "scheduler" / "scheduler_config.json").unlink()
    pipe = DDIMPipeline.from_pretrained(folder, scheduler=noise)
    same_weights(pipe.unet, unet)
    assert pipe.scheduler.config.beta_end == 0.03
    pipe = DDIMPipeline.from_pretrained(folder, unet=own, scheduler=noise)
    assert pipe.unet is own and pipe.scheduler.config.beta_end == 0.03


def test_entries_of_the_networks_config_are_not_swallowed_by_a_pipeline(folder):
    with pytest.raises(TypeError, match=r"dropout: entries of the network's config; pass unet=UNet2DModel"):
        DDIMPipeline.from_pretrained(folder, dropout=0.5)


def test_downloads_take_the_same_options(folder, said):
    options = {"custom_pipeline": "x", "torch_dtyp": 1, "variant": None, "use_onnx": False}
    assert DDIMPipeline.download(str(folder), **options) == str(folder)
    assert "custom_pipeline has no effect" in said.text and "torch_dtyp has no effect" in said.text


class TestSaving:
    def test_only_the_main_process_writes(self, unet, tmp_path):
        unet.save_pretrained(tmp_path / "a", is_main_process=False)
        assert not (tmp_path / "a").exists()
        unet.save_pretrained(tmp_path / "a", is_main_process=True)
        assert (tmp_path / "a" / "config.json").exists()

    def test_an_own_function_writes_the_bin_files(self, unet, tmp_path, same_weights):
        written = []

        def own(tensors, path):
            written.append(path)
            torch.save(tensors, path)

        unet.save_pretrained(tmp_path, save_function=own, safe_serialization=False)
        assert [path.rsplit("/")[-1] for path in written] == ["diffusion_pytorch_model.bin"]
        same_weights(UNet2DModel.from_pretrained(tmp_path), unet)

    @pytest.mark.parametrize("part", ["unet", "pipe"])
    def test_what_is_pushed_is_what_was_saved(self, unet, scheduler, tmp_path, monkeypatch, part):
        pushed = {}
        saver = unet if part == "unet" else DDIMPipeline(unet, scheduler)
        monkeypatch.setattr(
            type(saver), "push_to_hub", lambda self, repo, **options: pushed.update(options, repo=repo)
        )
        saver.save_pretrained(tmp_path / "mine", variant="fp16", push_to_hub=False)
        assert not pushed
        saver.save_pretrained(tmp_path / "mine/", variant="fp16", push_to_hub=True, private=True)
        assert (pushed["repo"], pushed["variant"], pushed["private"]) == ("mine", "fp16", True)

    @pytest.mark.parametrize("part", ["unet", "pipe"])
    def test_options_for_the_hub_alone_are_refused_without_it(self, unet, scheduler, tmp_path, part):
        saver = unet if part == "unet" else DDIMPipeline(unet, scheduler)
        with pytest.raises(TypeError, match="private: for push_to_hub=True only"):
            saver.save_pretrained(tmp_path / "mine", private=True)
        assert not (tmp_path / "mine").exists()


def test_configs_that_are_saved_say_the_class_that_others_load(unet, scheduler, tmp_path):
    class Own(UNet2DModel):
        pass

    own = Own.from_config(unet.config)
    DDIMPipeline(own, scheduler).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "unet/config.json").read_text())["_class_name"] == "UNet2DModel"
    assert isinstance(diffusers.DDIMPipeline.from_pretrained(tmp_path).unet, diffusers.UNet2DModel)
