"""Damaged, foreign and hostile files: every error says which file, and what to do."""

import json
import os
import pickle

import pytest
import torch
from parts import load_parts
from safetensors.torch import load_file, save_file

from ddim_fast.checkpoints import save_pipeline, save_unet
from ddim_fast.scheduler import DDIMScheduler
from ddim_fast.unet import UNet2DModel

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(unet, scheduler, tmp_path):
    save_pipeline(unet, scheduler, tmp_path / "pipe")
    return tmp_path / "pipe"


def edit_json(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def edit_weights(folder, edit):
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file(state, folder / WEIGHTS)


def test_missing_unexpected_and_misshapen_weights_are_all_named(folder):
    def edit(state):
        del state["conv_in.bias"]
        state["conv_inn.bias"] = torch.zeros(8)
        state["conv_out.weight"] = torch.zeros(1, 4, 3, 3)

    edit_weights(folder, edit)
    with pytest.raises(ValueError) as error:
        load_parts(folder)
    for part in (
        str(folder / WEIGHTS),
        "missing: conv_in.bias",
        "unexpected: conv_inn.bias",
        "conv_out.weight in",
        "found (1, 4, 3, 3), expected (1, 8, 3, 3)",
    ):
        assert part in str(error.value)


def test_a_long_list_of_names_is_cut(folder, tiny_config):
    edit_json(folder / "unet/config.json", layers_per_block=3)
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more"):
        load_parts(folder)


def test_the_shard_with_the_wrong_weight_is_named(unet, tmp_path):
    save_unet(unet, tmp_path, max_shard_size="90KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shard = tmp_path / index["weight_map"]["conv_out.weight"]
    state = load_file(shard)
    state["conv_out.weight"] = torch.zeros(2)
    save_file(state, shard)
    with pytest.raises(ValueError, match=rf"conv_out.weight in .*{shard.name}: found \(2,\), expected \(1, 8, 3, 3\)"):
        UNet2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, "unet/diffusion_pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "error"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[:5], "cut off"),
        (lambda data: data[: len(data) // 2], "cut off"),
        (lambda data: data[:-1], "cut off"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (lambda data: b"<html>429 Too Many Requests</html>" * 10, "cut off|damaged"),
    ],
)
def test_damaged_weights_name_the_file(unet, scheduler, tmp_path, name, content, error):
    save_pipeline(unet, scheduler, tmp_path, safe_serialization=name == WEIGHTS)
    path = tmp_path / name
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ValueError, match=error) as raised:
        load_parts(tmp_path)
    assert str(path) in str(raised.value)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_bin_file_does_not_run(folder, tmp_path, zipped):
    (folder / WEIGHTS).unlink()
    path = folder / "unet/diffusion_pytorch_model.bin"
    content = {"conv_in.weight": Evil(str(tmp_path / "owned"))}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin .*weights_only=True.*safetensors"):
        load_parts(folder)
    assert not (tmp_path / "owned").exists()


def test_a_bin_file_must_hold_tensors(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"state_dict": {}, "epoch": 3}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold a dict of tensors, found a dict with the entries 'state_dict'"):
        load_parts(folder)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'{"a": 1,', "is not valid JSON: .*line 1"),
        (b"", "is not valid JSON"),
        (b"[1]", "must hold a JSON object, found list"),
        (b"\xff\xfe\x00", "is not a text file"),
        (b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_wrong_json_names_the_file(folder, name, content, error):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=error) as raised:
        load_parts(folder)
    assert str(folder / name) in str(raised.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"block_out_channels": None},
        {"block_out_channels": [8]},
        {"down_block_types": ["DownBlock2D", "os.system"]},
        {"act_fn": "__import__('os').system('true')"},
        {"norm_num_groups": 7},
        {"in_channels": "many"},
    ],
)
def test_a_config_no_network_can_be_built_from_is_named(folder, entries):
    edit_json(folder / "unet/config.json", **entries)
    with pytest.raises(ValueError, match=r"unet/config.json describes no network that can be built"):
        load_parts(folder)


def test_a_scheduler_config_none_can_be_built_from_is_named(folder):
    edit_json(folder / "scheduler/scheduler_config.json", beta_schedule="pickle")
    with pytest.raises(ValueError, match=r"scheduler_config.json describes no scheduler that can be built: .*pickle"):
        DDIMScheduler.from_pretrained(folder)


@pytest.mark.parametrize(
    "shard", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".hidden", "", 3, "C:x"]
)
def test_an_index_cannot_lead_out_of_its_folder(unet, scheduler, tmp_path, shard):
    save_pipeline(unet, scheduler, tmp_path / "pipe", max_shard_size="90KB")
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "evil.safetensors")
    edit_json(
        tmp_path / "pipe/unet/diffusion_pytorch_model.safetensors.index.json", weight_map={"conv_in.weight": shard}
    )
    with pytest.raises(ValueError, match=r"index.json refers to .*only plain names of files in its own folder"):
        load_parts(tmp_path / "pipe")


def test_a_pipeline_index_cannot_lead_out_of_its_folder(folder):
    (folder / "model_index.json").write_text(json.dumps({"../../net": ["diffusers", "UNet2DModel"]}))
    with pytest.raises(ValueError, match=r"model_index.json refers to '../../net'"):
        load_parts(folder)


@pytest.mark.parametrize("subfolder", ["..", "unet/../..", "/etc", "..\\..", "C:/x"])
def test_a_subfolder_is_inside(folder, subfolder):
    with pytest.raises(ValueError, match="leaves the folder"):
        UNet2DModel.from_pretrained(folder, subfolder=subfolder)


def test_classes_a_file_names_are_never_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit_json(folder / "model_index.json", extra=["evil_module", "Evil"], scheduler=["evil_module", "EvilScheduler"])
    edit_json(folder / "scheduler/scheduler_config.json", _class_name="evil_module.EvilScheduler")
    load_parts(folder)
    edit_json(folder / "model_index.json", unet=["evil_module", "Net"])
    with pytest.raises(ValueError, match="its unet is a Net; DDIMPipeline samples from a UNet2DModel"):
        load_parts(folder)


def test_another_kind_of_network_is_refused_by_name(folder):
    edit_json(folder / "unet/config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(ValueError, match="describes a UNet2DConditionModel, not a UNet2DModel"):
        load_parts(folder)
    (folder / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "DiTTransformer2DModel"]}))
    with pytest.raises(ValueError, match=r"none of its components is a UNet2DModel; it lists: transformer"):
        load_parts(folder)


def test_a_network_alone_says_how_to_make_a_pipeline_of_it(folder):
    with pytest.raises(FileNotFoundError, match=r"UNet2DModel.from_pretrained\(.*DDIMPipeline\(unet, DDIMScheduler"):
        load_parts(folder / "unet")


def test_other_folders_say_what_is_missing_and_what_there_is(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is empty or missing"):
        load_parts(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"has no unet \(config.json\).* it holds: scheduler_config.json"):
        load_parts(folder / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"pipe/ema is empty or missing"):
        load_parts(folder, subfolder="ema")
    (folder / WEIGHTS).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"unet has no weights: expected .*safetensors or .*bin; it holds: conf"
    ):
        load_parts(folder)


@pytest.mark.parametrize("path", ["./nothing", "/no/such/folder", "a/b/c", "~/nothing-here", "model.ckpt", ""])
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_parts(path)


def test_variants_there_are_get_listed(unet, tmp_path):
    save_unet(unet, tmp_path, variant="fp16")
    with pytest.raises(FileNotFoundError, match="weights only as a variant; pass one of: variant='fp16'"):
        UNet2DModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights for variant='bf16'; it has: variant='fp16'"):
        UNet2DModel.from_pretrained(tmp_path, variant="bf16")
    save_unet(unet, tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"'bf16'; it has: the default .no variant., variant='fp16'"):
        UNet2DModel.from_pretrained(tmp_path, variant="bf16")


def test_a_wrong_format_choice_is_explained(unet, tmp_path):
    save_unet(unet, tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"weights only as \.bin; pass use_safetensors=None"):
        UNet2DModel.from_pretrained(tmp_path, use_safetensors=True)


def test_missing_shards_and_missing_indices_are_named(unet, tmp_path):
    save_unet(unet, tmp_path, max_shard_size="90KB")
    shard = next(tmp_path.glob("*-00001-of-*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"index.json names {shard.name}, which is missing"):
        UNet2DModel.from_pretrained(tmp_path)
    next(tmp_path.glob("*index.json")).unlink()
    with pytest.raises(FileNotFoundError, match=r"shards of the weights, but not the \*.index.json"):
        UNet2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"torch_dtype": "float16"},
            "torch_dtype must be a floating point dtype such as torch.float16, 'auto', or .* got 'float16'",
        ),
        ({"torch_dtype": torch.int8}, "torch_dtype must be a floating point dtype"),
        ({"variant": 16}, "variant must be a string"),
        ({"variant": "../x"}, "variant='../x' must be letters"),
        ({"use_safetensors": "yes"}, "use_safetensors must be True, False or None"),
    ],
)
def test_bad_arguments(folder, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        load_parts(folder, **options)


def test_a_name_must_be_a_path_or_a_string():
    with pytest.raises(TypeError, match="must be a folder or the name of a model on the Hub, got NoneType"):
        load_parts(None)
