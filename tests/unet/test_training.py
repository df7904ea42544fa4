"""The network trains: the gradients are diffusers', with gradient checkpointing or without."""

import pytest
import torch

from ddim_fast.unet import UNet2DModel

NETWORKS = {
    "standard": {},
    "skip": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
    "K": {
        "down_block_types": ("KDownBlock2D", "KDownBlock2D"),
        "up_block_types": ("KUpBlock2D", "KUpBlock2D"),
    },
    "scale and shift": {
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
}


def gradients(model, sample, timestep, target):
    model.zero_grad()
    loss = torch.nn.functional.mse_loss(model(sample, timestep).sample, target)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_those_of_diffusers(twins, noisy, network):
    theirs, ours = (model.train() for model in twins(**NETWORKS[network]))
    sample, timestep = noisy(size=(8, 8))
    target = noisy(size=(8, 8), seed=1)[0]
    expected = gradients(theirs, sample, timestep, target)
    got = gradients(ours, sample, timestep, target)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("network", NETWORKS)
def test_gradient_checkpointing_gives_the_same_gradients(small_config, noisy, network):
    model = UNet2DModel(**{**small_config, **NETWORKS[network], "dropout": 0.2}).train()
    sample, timestep = noisy(size=(8, 8))
    target = noisy(size=(8, 8), seed=1)[0]
    results = []
    with torch.random.fork_rng(devices=[]):
        for enabled in (False, True):
            (model.enable_gradient_checkpointing if enabled else model.disable_gradient_checkpointing)()
            assert model.is_gradient_checkpointing is enabled
            torch.manual_seed(0)
            results.append(gradients(model, sample, timestep, target))
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


@pytest.mark.parametrize("network", NETWORKS)
def test_gradient_checkpointing_saves_memory(small_config, noisy, network):
    """What autograd keeps for the backward pass shrinks."""
    model = UNet2DModel(**{**small_config, **NETWORKS[network]}).train()
    sample, timestep = noisy(size=(8, 8))

    def saved_bytes():
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(sample, timestep).sample
        return sum(size for pointer, size in storages.items() if pointer not in weights), out

    whole, _ = saved_bytes()
    model.enable_gradient_checkpointing()
    checkpointed, _ = saved_bytes()
    assert checkpointed < 0.7 * whole


def test_dropout_is_active_in_training_only(small_config, noisy):
    model = UNet2DModel(**small_config, dropout=0.5)
    sample, timestep = noisy(size=(8, 8))
    with torch.no_grad():
        assert not torch.equal(model.train()(sample, timestep).sample, model(sample, timestep).sample)
        assert torch.equal(model.eval()(sample, timestep).sample, model(sample, timestep).sample)


def test_a_few_steps_of_training_fit_a_batch(small_config, noisy):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet2DModel(**small_config).train()
    sample, timestep = noisy(size=(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(sample, timestep).sample, sample)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
