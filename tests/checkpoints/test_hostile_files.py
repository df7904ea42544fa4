"""What a downloaded folder holds is data: nothing in it leads elsewhere, runs, writes, or takes time and memory."""

import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import load_parts
from safetensors.torch import load_file, save_file

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.checkpoints import save_pipeline

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", WEIGHTS)


@pytest.fixture
def folder(unet, scheduler, tmp_path):
    save_pipeline(unet, scheduler, tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def soon():
    """The test's own work takes at most this long (processor time, as other work may go on beside it)."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 2


def edit_json(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def replace_by(path, kind, tmp_path):
    """Put something else in the place of a file; the file itself becomes `elsewhere`."""
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "absolute link":
        path.symlink_to(elsewhere)
    elif kind == "relative link":
        path.symlink_to(os.path.relpath(elsewhere, path.parent))
    elif kind == "link to nothing":
        path.symlink_to("nothing")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "absolute link", "relative link", "link to nothing"])
@pytest.mark.parametrize("name", FILES)
def test_only_files_of_the_folder_are_read(folder, tmp_path, soon, name, kind):
    replace_by(folder / name, kind, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=Path(name).name.replace(".", r"\.")):
        load_parts(folder)


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_a_part_that_links_elsewhere_is_refused(folder, tmp_path, part):
    (folder / part).rename(tmp_path / "private")
    (folder / part).symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=rf"{part}/\w+.json is a link that leaves its folder"):
        load_parts(folder)


def test_a_link_that_the_user_names_is_followed_and_links_may_stay_inside(folder, tmp_path, unet, same_weights):
    (folder / WEIGHTS).rename(folder / "weights")
    (folder / WEIGHTS).symlink_to("../weights")
    (tmp_path / "current").symlink_to(folder)
    same_weights(load_parts(tmp_path / "current")[0], unet)


def test_what_only_looks_like_the_hubs_cache_is_refused(folder, tmp_path):
    """A snapshot's links lead to its own repository's blobs, and nowhere else."""
    snapshot = tmp_path / "models--me--x" / "snapshots" / "1"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    for blobs in ("models--me--x/blobs/../secret", "models--you--x/blobs/1", "secret"):
        target = tmp_path / blobs
        target.parent.mkdir(parents=True, exist_ok=True)
        config = snapshot / "unet" / "config.json"
        text = config.read_text()
        config.unlink()
        target.write_text(text)
        config.symlink_to(target)
        with pytest.raises(ValueError, match=r"config.json is a link that leaves its folder"):
            load_parts(snapshot)


@pytest.mark.parametrize("load", [DDIMPipeline.from_pretrained, DDIMPipeline.download, UNet2DModel.from_pretrained])
def test_loading_changes_nothing_on_the_disk(folder, tmp_path, load):
    def tree():
        return {
            str(path): (path.lstat().st_mtime_ns, path.lstat().st_ctime_ns, path.lstat().st_ino)
            for path in [tmp_path, *tmp_path.rglob("*")]
        }

    for name in (".ddim-fast-committed", ".ddim-fast-writing", ".ddim-fast-committed-x", ".ddim-fast-done"):
        (folder / name / "unet").mkdir(parents=True)
        (folder / name / "manifest.json").write_text(
            '{"files": ["../../x"], "remove": ["../../pipe/model_index.json"]}'
        )
    (folder / ".ddim-fast-lock").write_text("process 1")
    before = tree()
    load(str(folder))
    assert tree() == before


@pytest.mark.parametrize(
    "entries",
    [
        {"layers_per_block": 10**5},
        {"layers_per_block": 10**9},
        {"layers_per_block": -1},
        {"layers_per_block": "1"},
        {"block_out_channels": [10**9, 10**9]},
        {"block_out_channels": [8] * 10**5, "down_block_types": ["DownBlock2D"] * 10**5},
        {"down_block_types": "DownBlock2D"},
        {"in_channels": 10**12},
        {"num_class_embeds": 10**12},
        {"num_train_timesteps": 10**12, "time_embedding_type": "learned"},
        {"time_embedding_dim": 10**12},
        {"norm_eps": "1e-5"},
        {"norm_eps": float("nan")},
        {"norm_num_groups": 0},
        {"downsample_padding": -5},
        {"freq_shift": 10**30},
        {"freq_shift": 4},
        {"act_fn": 5},
        {"attention_head_dim": [[8]]},
        {"mid_block_scale_factor": 0},
        {"dropout": -1},
        {"sample_size": "8"},
        {"sample_size": [8]},
        {"sample_size": 8.5},
        {"sample_size": 0},
        {"sample_size": -8},
        {"sample_size": [8, 8, 8]},
        {"center_input_sample": "false"},
    ],
    ids=lambda entries: ", ".join(f"{name}={str(value)[:20]}" for name, value in entries.items()),
)
def test_impossible_entries_of_a_network_are_named_at_once(folder, soon, entries):
    edit_json(folder / "unet/config.json", **entries)
    with pytest.raises(ValueError, match=r"unet/config\.json") as raised:
        load_parts(folder)
    assert next(iter(entries)) in str(raised.value) and len(str(raised.value)) < 2000


@pytest.mark.parametrize(
    "entries",
    [
        {"num_train_timesteps": 10**8},
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": True},
        {"beta_start": "0.1"},
        {"beta_end": float("inf")},
        {"steps_offset": 1.5},
        {"clip_sample": "no"},
        {"clip_sample_range": [1]},
        {"trained_betas": ["a"]},
        {"trained_betas": {"0": 0.1}},
        {"prediction_type": ["epsilon"]},
        {"timestep_spacing": 3},
    ],
    ids=lambda entries: ", ".join(f"{name}={str(value)[:20]}" for name, value in entries.items()),
)
def test_impossible_entries_of_a_scheduler_are_named_at_once(folder, soon, entries):
    edit_json(folder / "scheduler/scheduler_config.json", **entries)
    with pytest.raises(ValueError, match=r"scheduler/scheduler_config\.json") as raised:
        load_parts(folder)
    assert next(iter(entries)) in str(raised.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_entry_gives_a_network_or_a_clear_error(folder, data):
    path = folder / data.draw(st.sampled_from(["unet/config.json", "scheduler/scheduler_config.json"]))
    text = path.read_text()
    try:
        name = data.draw(st.sampled_from(sorted(json.loads(text))))
        edit_json(path, **{name: data.draw(JSON)})
        load_parts(folder)
    except ValueError as error:
        assert path.name in str(error) or "weights" in str(error)
    finally:
        path.write_text(text)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize(
    "text",
    ['{"a": ' + "9" * 100_000 + "}", "[" * 100_000, "{" * 5, " " * (17 << 20), "null", '{"_class_name": []}', "\0"],
    ids=["digits", "depth", "braces", "size", "null", "list", "zero"],
)
def test_json_of_any_kind_is_answered_at_once(folder, soon, name, text):
    (folder / name).write_text(text)
    try:
        load_parts(folder)
    except (ValueError, FileNotFoundError) as error:
        assert Path(name).name in str(error)


def header(entries, size=0):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


F32 = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}" * 100,
        struct.pack("<Q", 10) + b"{}" * 100,
        header({"a": F32}, 31),
        header({"a": F32}, 33),
        header({"a": {**F32, "shape": [-8]}}, 32),
        header({"a": {**F32, "shape": [2**40, 0]}}, 32),
        header({"a": {**F32, "shape": ["8"]}}, 32),
        header({"a": {**F32, "data_offsets": [0]}}, 32),
        header({"a": {**F32, "data_offsets": [32, 0]}}, 32),
        header({"a": {**F32, "data_offsets": [0, 2**70]}}, 32),
        header({"a": {**F32, "dtype": ["F32"]}}, 32),
        header({"a": {**F32, "dtype": "F4"}}, 32),
        header({"a": F32, "b": F32}, 32),
        header({"a": None}, 32),
        header(["a"], 32),
        header({"a": {"shape": {}, "dtype": {}, "data_offsets": {}}}, 32),
    ],
)
def test_any_header_of_safetensors_is_answered_by_name(folder, soon, content):
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        load_parts(folder)


def test_a_header_of_a_million_tensors_is_refused_at_once(folder):
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"t{number}":{empty}' for number in range(1_000_000)) + "}").encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors describes its tensors in \d+ bytes"):
        load_parts(folder)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_numbers_that_are_not_real_are_refused_by_name(folder, dtype, extension):
    state = load_file(folder / WEIGHTS)
    state["conv_in.bias"] = torch.ones(8).to(dtype)
    (folder / WEIGHTS).unlink()
    path = (folder / WEIGHTS).with_suffix(f".{extension}")
    save_file(state, path) if extension == "safetensors" else torch.save(state, path)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"{path.name}.*conv_in\.bias .* holds {kind} numbers"):
        load_parts(folder)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(8).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8),
        lambda: torch.ones(8, device="meta"),
        lambda: torch.ones(1).expand(8),
    ],
    ids=["sparse", "quantized", "meta", "repeated"],
)
def test_tensors_that_are_no_plain_numbers_are_refused_by_name(folder, make):
    state = load_file(folder / WEIGHTS)
    state["conv_in.bias"] = make()
    (folder / WEIGHTS).unlink()
    torch.save(state, (folder / WEIGHTS).with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin"):
        load_parts(folder)


def test_a_compressed_bin_file_is_refused_by_name(folder):
    path = (folder / WEIGHTS).with_suffix(".bin")
    torch.save(load_file(folder / WEIGHTS), path)
    (folder / WEIGHTS).unlink()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin .* is compressed; save it again"):
        load_parts(folder)


@pytest.mark.parametrize("name", ["model.ckpt", "ckpt.pth", "model.pt", "x.bin", "x.safetensors"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello\n", "text file"),
        ("#!/bin/sh\necho\n", "text file"),
        ("épîgraphe " * 300, "text file"),
        ("<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
        ("\n  <html lang='en'>", "web page"),
        ('{"error": "Unauthorized"}', "text file"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("", "is empty"),
    ],
)
def test_text_in_the_place_of_a_checkpoint_is_said_to_be_text(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said) as raised:
        load_parts(tmp_path / name)
    assert name in str(raised.value)


def test_a_pipe_named_as_a_checkpoint_is_refused_at_once(tmp_path, soon):
    os.mkfifo(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt is a pipe"):
        load_parts(tmp_path / "model.ckpt")


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_a_loaded_network_does_not_change_with_its_file(unet, scheduler, tmp_path, same_weights, extension):
    """A file may be written over in place, as `cp` and `rsync --inplace` do."""
    save_pipeline(unet, scheduler, tmp_path, safe_serialization=extension == "safetensors")
    path = tmp_path / f"unet/diffusion_pytorch_model.{extension}"
    loaded = load_parts(tmp_path)[0]
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    same_weights(loaded, unet)


def test_a_process_outlives_the_cutting_of_its_weights_file(folder):
    script = (
        "import os, sys\n"
        "from ddim_fast import DDIMPipeline\n"
        "pipe = DDIMPipeline.from_pretrained(sys.argv[1])\n"
        "os.truncate(sys.argv[2], 100)\n"
        "pipe(num_inference_steps=1, output_type='np')\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(folder / WEIGHTS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_no_two_loaded_weights_share_memory(unet, scheduler, tmp_path, extension):
    save_pipeline(unet, scheduler, tmp_path, safe_serialization=extension == "safetensors")
    if extension == "bin":
        path = tmp_path / "unet/diffusion_pytorch_model.bin"
        state = torch.load(path)
        whole = torch.zeros(16)
        state["down_blocks.0.resnets.0.norm1.weight"] = state["down_blocks.0.resnets.0.norm1.bias"] = whole[:8]
        torch.save(state, path)
    parameters = list(load_parts(tmp_path)[0].parameters())
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)


def test_a_scheduler_reads_nothing_but_its_config(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe" / "unet" / "extra.json")
    (folder / WEIGHTS).unlink()
    assert isinstance(DDIMScheduler.from_pretrained(folder), DDIMScheduler)
