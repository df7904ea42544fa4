"""What is saved loads in diffusers, and a save that is cut off changes nothing."""

import json
import os

import pytest
import torch
from parts import load_parts
from safetensors import safe_open
from safetensors.torch import load_file

from ddim_fast.checkpoints import save_pipeline, save_scheduler, save_unet
from ddim_fast.scheduler import DDIMScheduler
from ddim_fast.unet import UNet2DModel


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture
def other(tiny_config):
    torch.manual_seed(9)
    return UNet2DModel(**tiny_config).eval()


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("shards", ["10GB", 4000])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_diffusers_loads_what_we_save(diffusers, unet, scheduler, same_weights, tmp_path, shards, safe, variant):
    save_pipeline(unet, scheduler, tmp_path, safe_serialization=safe, variant=variant, max_shard_size=shards)

    # diffusers finds shards of .bin files only if it is told not to look for safetensors.
    choice = {} if safe or shards == "10GB" else {"use_safetensors": False}
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet", variant=variant, **choice)

    same_weights(theirs, unet)
    own = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
    given = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    assert own == {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
    if not choice:
        pipe = diffusers.DDIMPipeline.from_pretrained(tmp_path, variant=variant)
        same_weights(pipe.unet, unet)
        assert pipe.scheduler.config.beta_schedule == "scaled_linear" and pipe.scheduler.config.steps_offset == 1


@pytest.mark.parametrize(
    "options", [{}, {"variant": "fp16"}, {"max_shard_size": "4KB"}, {"safe_serialization": False}]
)
def test_names_and_json_are_those_diffusers_writes(diffusers, unet, scheduler, tiny_config, tmp_path, options):
    theirs = diffusers.UNet2DModel(**tiny_config)
    theirs.load_state_dict(unet.state_dict())
    pipe = diffusers.DDIMPipeline(
        theirs, diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    )
    pipe.save_pretrained(tmp_path / "theirs", **options)
    save_pipeline(unet, scheduler, tmp_path / "ours", **options)

    names = files(tmp_path / "ours")
    assert names == files(tmp_path / "theirs")
    for name in names:
        ours, expected = tmp_path / "ours" / name, tmp_path / "theirs" / name
        if name.endswith(".json"):
            left, right = json.loads(ours.read_text()), json.loads(expected.read_text())
            left.pop("_diffusers_version", None), right.pop("_diffusers_version", None)
            assert left == right
            assert ours.read_text().splitlines()[:2] == expected.read_text().splitlines()[:2]
        elif name.endswith(".safetensors"):
            assert ours.read_bytes() == expected.read_bytes()
            assert safe_open(ours, "pt").metadata() == {"format": "pt"}
        else:
            assert torch.load(ours, weights_only=True).keys() == torch.load(expected, weights_only=True).keys()


def test_a_scheduler_of_ours_brings_no_warning_in_diffusers(diffusers, tmp_path, caplog):
    save_scheduler(DDIMScheduler(), tmp_path)
    assert diffusers.DDIMScheduler().config.keys() - json.loads(
        (tmp_path / "scheduler_config.json").read_text()
    ).keys() <= {"_use_default_values"}
    assert "previous_timestep" not in (tmp_path / "scheduler_config.json").read_text()


def test_what_diffusers_does_not_know_survives_our_own_round_trip(unet, tmp_path):
    scheduler = DDIMScheduler(timestep_spacing="quad", previous_timestep="schedule", trained_betas=[0.1] * 1000)
    save_pipeline(unet, scheduler, tmp_path)
    _, again = load_parts(tmp_path)
    for name, value in scheduler.config.items():
        assert name.startswith("_") or again.config[name] == value, name
    assert torch.equal(again.betas, scheduler.betas)


def test_saving_the_parts_of_a_diffusers_pipeline(diffusers, tiny_config, same_weights, tmp_path):
    theirs = diffusers.UNet2DModel(**tiny_config)
    save_pipeline(theirs, diffusers.PNDMScheduler(), tmp_path)
    same_weights(diffusers.PNDMPipeline.from_pretrained(tmp_path).unet, theirs)
    same_weights(load_parts(tmp_path)[0], theirs)


def test_weights_keep_their_dtype_and_any_memory_layout(unet, same_weights, tmp_path):
    unet = unet.half().to(memory_format=torch.channels_last)
    save_unet(unet, tmp_path)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16
    same_weights(UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.float16), unet)


def test_an_entry_that_json_cannot_hold_is_named(unet, tmp_path):
    unet.register_to_config(note=object())
    with pytest.raises(TypeError, match=r"config.json cannot be written: an entry is a object"):
        save_unet(unet, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.iterdir())


def test_a_network_without_values_is_not_saved(unet, tmp_path):
    with pytest.raises(ValueError, match=r"no values for conv_in.weight"):
        save_unet(unet.to("meta"), tmp_path / "new")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"variant": "../fp16"}, "variant='../fp16'"),
        ({"variant": 16}, "variant must be a string"),
        ({"max_shard_size": 0}, "max_shard_size must be at least 1 byte, got 0"),
        ({"max_shard_size": 1.5}, "max_shard_size must be a number of bytes"),
        ({"max_shard_size": "5 parsecs"}, "(?i)unit|size"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(unet, scheduler, tmp_path, options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        save_pipeline(unet, scheduler, tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())


def test_saving_into_a_file_is_refused(unet, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError, match="taken: it is a file"):
        save_unet(unet, tmp_path / "taken")


def test_other_files_in_the_folder_are_kept(unet, scheduler, tmp_path):
    own = {"notes.txt": "a", "unet/optimizer.bin": "b", "unet/model.safetensors": "c", "samples/0.png": "d"}
    for name, text in own.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for _ in range(2):
        save_pipeline(unet, scheduler, tmp_path)
    assert {name: (tmp_path / name).read_text() for name in own} == own
    assert len(files(tmp_path)) == len(own) + 4


@pytest.mark.parametrize("earlier", [{}, {"max_shard_size": "4KB"}, {"safe_serialization": False}])
@pytest.mark.parametrize("later", [{}, {"max_shard_size": "8KB"}, {"safe_serialization": False}])
def test_weights_of_an_earlier_save_do_not_linger(unet, other, same_weights, tmp_path, earlier, later):
    """Else an old index, or old safetensors beside a new .bin, would be loaded in place of the new weights."""
    save_unet(unet, tmp_path, **earlier)
    save_unet(unet, tmp_path, variant="fp16")
    save_unet(other, tmp_path, **later)
    same_weights(UNet2DModel.from_pretrained(tmp_path), other)
    same_weights(UNet2DModel.from_pretrained(tmp_path, variant="fp16"), unet)
    save_unet(other, tmp_path / "fresh", **later)
    assert set(os.listdir(tmp_path)) - {"fresh"} == {
        *os.listdir(tmp_path / "fresh"),
        "diffusion_pytorch_model.fp16.safetensors",
    }


def test_a_new_folder_has_ordinary_permissions(unet, tmp_path):
    (tmp_path / "plain").mkdir()
    save_unet(unet, tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_saving_through_links_leaves_what_they_point_to_alone(unet, other, same_weights, tmp_path):
    """The Hub's cache is such links; its files are shared between snapshots."""
    save_unet(unet, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    save_unet(other, tmp_path / "snapshot")
    same_weights(UNet2DModel.from_pretrained(tmp_path / "snapshot"), other)
    same_weights(UNet2DModel.from_pretrained(tmp_path / "blobs"), unet)
