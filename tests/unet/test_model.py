"""What a user meets besides the prediction: results, properties, and errors that name the argument."""

import diffusers
import pytest
import torch

from ddim_fast.unet import UNet2DModel, UNet2DOutput


@pytest.fixture(scope="module")
def model(small_config):
    return UNet2DModel(**small_config).eval()


def test_the_signature_is_that_of_diffusers():
    import inspect

    theirs = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    ours = inspect.signature(UNet2DModel.__init__).parameters
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}
    assert list(ours) == list(theirs)
    assert list(inspect.signature(UNet2DModel.forward).parameters) == list(
        inspect.signature(diffusers.UNet2DModel.forward).parameters
    )


def test_the_output_reads_by_attribute_index_and_key(model, noisy):
    with torch.no_grad():
        output = model(*noisy())
        (sample,) = model(*noisy(), return_dict=False)
    assert isinstance(output, UNet2DOutput)
    assert output.sample is output[0] is output["sample"]
    assert torch.equal(output.sample, sample)


def test_sizes_dtype_and_device(small_config):
    ours, theirs = (
        UNet2DModel(**small_config, num_class_embeds=5),
        diffusers.UNet2DModel(**small_config, num_class_embeds=5),
    )
    ours.conv_in.requires_grad_(False)
    theirs.conv_in.requires_grad_(False)
    for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**options) == theirs.num_parameters(**options)
    assert ours.dtype == torch.float32 and ours.device == torch.device("cpu")
    assert ours.half().dtype == torch.float16
    assert ours.to("meta").device == torch.device("meta")


def test_a_network_made_without_memory_runs_once_it_has_weights(twins, noisy):
    """Nothing but the state dict holds values, so building on the meta device and assigning weights is enough."""
    k = {"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KUpBlock2D",) * 2}
    _, model = twins(**k)
    with torch.device("meta"):
        empty = UNet2DModel.from_config(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(empty.eval()(*noisy()).sample, model(*noisy()).sample)


@pytest.mark.parametrize("kind", ["Down", "SkipDown", "KDown"])
def test_it_exports_in_one_graph_with_any_batch(twins, noisy, kind):
    up = kind.replace("Down", "Up")
    _, model = twins(down_block_types=(f"{kind}Block2D",) * 2, up_block_types=(f"{up}Block2D",) * 2)
    batch = torch.export.Dim("batch", min=2, max=1024)
    shapes = {"sample": {0: batch}, "timestep": {0: batch}}
    exported = torch.export.export(model, noisy(), dynamic_shapes=shapes).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(*noisy(batch=5)).sample, model(*noisy(batch=5)).sample)


def test_it_is_saved_and_loaded_with_the_options_of_checkpoints(twins, noisy, tmp_path):
    _, model = twins(num_class_embeds=3)
    model.save_pretrained(tmp_path / "unet", variant="ema")
    loaded = UNet2DModel.from_pretrained(tmp_path, subfolder="unet", variant="ema", torch_dtype=torch.float64).eval()
    assert loaded.dtype == torch.float64
    assert all(torch.equal(loaded.state_dict()[name].float(), value) for name, value in model.state_dict().items())


def test_layers_say_what_they_compute(small_config):
    model = UNet2DModel(**small_config, attention_head_dim=16, norm_eps=1e-4, mid_block_scale_factor=2.0)
    resnet, attention = model.mid_block.resnets[0], model.mid_block.attentions[0]
    assert (resnet.eps, resnet.groups, resnet.output_scale_factor) == (1e-4, 32, 2.0)
    assert (resnet.time_embedding_norm, resnet.skip_time_act) == ("default", False)
    assert (attention.heads, attention.head_dim, attention.rescale_output_factor) == (4, 16, 2.0)
    assert model.down_blocks[0].attentions is None and len(model.down_blocks[1].attentions) == 1


@pytest.mark.parametrize(
    ("config", "argument"),
    [
        ({"block_out_channels": (32, 64, 64)}, "block_out_channels"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types"),
        ({"down_block_types": ("DownBlock2D", "LeftBlock2D")}, "LeftBlock2D"),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "CrossAttnDownBlock2D"),
        ({"up_block_types": ("SimpleCrossAttnUpBlock2D", "UpBlock2D")}, "SimpleCrossAttnUpBlock2D"),
        ({"down_block_types": ("DownEncoderBlock2D", "DownBlock2D")}, "DownEncoderBlock2D"),
        ({"up_block_types": ("UpBlock2D", "AttnUpDecoderBlock2D")}, "AttnUpDecoderBlock2D"),
        ({"down_block_types": ("DownBlock2D", "KDownBlock2D")}, "K blocks"),
        ({"down_block_types": ("SkipDownBlock2D", "DownBlock2D"), "in_channels": 1}, "in_channels"),
        ({"up_block_types": ("SkipUpBlock2D", "SkipUpBlock2D"), "out_channels": 1}, "out_channels"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"time_embedding_type": "sine"}, "time_embedding_type"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps"),
        ({"class_embed_type": "projection"}, "class_embed_type"),
        ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift"),
        ({"downsample_type": "pool"}, "downsample_type"),
        ({"upsample_type": "pool"}, "upsample_type"),
        ({"act_fn": "tanh"}, "act_fn"),
        ({"norm_num_groups": 7}, "norm_num_groups"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"attn_norm_num_groups": 7}, "attn_norm_num_groups"),
        ({"attention_head_dim": 128}, "attention_head_dim"),
        ({"attention_head_dim": 0}, "attention_head_dim"),
        ({"layers_per_block": 0}, "layers_per_block"),
        (
            {
                "down_block_types": ("KDownBlock2D",) * 2,
                "up_block_types": ("KUpBlock2D",) * 2,
                "block_out_channels": (16, 32),
                "norm_num_groups": 16,
            },
            "block_out_channels",
        ),
        (
            {
                "down_block_types": ("AttnSkipDownBlock2D",) * 2,
                "up_block_types": ("SkipUpBlock2D",) * 2,
                "block_out_channels": (48, 48),
                "norm_num_groups": 16,
            },
            "block_out_channels",
        ),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused_by_name(small_config, config, argument):
    with pytest.raises(ValueError, match=argument):
        UNet2DModel(**{**small_config, **config})


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (("DownEncoderBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")),
        (("DownBlock2D", "DownBlock2D"), ("UpDecoderBlock2D", "UpBlock2D")),
        (("DownBlock2D", "KDownBlock2D"), ("KUpBlock2D", "UpBlock2D")),
        (("KDownBlock2D", "DownBlock2D"), ("UpBlock2D", "KUpBlock2D")),
    ],
    ids=str,
)
def test_what_is_refused_does_not_run_in_diffusers_either(small_config, noisy, down, up):
    theirs = diffusers.UNet2DModel(**{**small_config, "down_block_types": down, "up_block_types": up})
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)), torch.no_grad():
        theirs(*noisy(batch=3))


@pytest.mark.parametrize(
    ("inputs", "argument"),
    [
        ({"sample": torch.zeros(2, 4, 16, 16)}, "sample"),
        ({"sample": torch.zeros(3, 16, 16)}, "sample"),
        ({"sample": torch.zeros(2, 3, 15, 16)}, "sample"),
        ({"timestep": torch.zeros(3)}, "timestep"),
        ({"timestep": torch.zeros(2, 1)}, "timestep"),
        ({"class_labels": torch.tensor([1, 2])}, "class_labels"),
    ],
    ids=["channels", "no batch", "odd height", "three timesteps", "timestep matrix", "unwanted labels"],
)
def test_a_wrong_input_is_refused_by_name(model, inputs, argument):
    with pytest.raises(ValueError, match=argument):
        model(**{"sample": torch.zeros(2, 3, 16, 16), "timestep": 1, **inputs})


def test_a_conditional_model_wants_labels(small_config, noisy):
    with pytest.raises(ValueError, match="class_labels"):
        UNet2DModel(**small_config, num_class_embeds=3)(*noisy())


def test_head_widths_of_each_resolution_or_block(small_config):
    """An extension: the middle has the last resolution's, both ways of the U the same unless told block by block."""
    config = {
        **small_config,
        "down_block_types": ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
    }

    def widths(head_dim):
        model = UNet2DModel(**config, attention_head_dim=head_dim)
        blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
        return [block.attentions[0].head_dim for block in blocks]

    assert widths((8, 16)) == [8, 16, 16, 16, 8]
    assert widths([8, 16, 32, 64, 4]) == [8, 16, 32, 64, 4]
    assert widths((None, 16)) == [32, 16, 16, 16, 32]
    assert widths(8) == [8] * 5
    with pytest.raises(ValueError, match=r"2 of them \(one a resolution\) or 5 \(one a block\); got \(8, 8, 8\)"):
        UNet2DModel(**config, attention_head_dim=(8, 8, 8))
