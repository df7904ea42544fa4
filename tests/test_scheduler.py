"""The scheduler gives what diffusers' gives, to the bit, and its own extensions do what the paper says."""

import copy
import json
import logging
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler as PeerScheduler
from diffusers import DDPMScheduler, PNDMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ddim_fast.scheduler import DDIMScheduler, DDIMSchedulerOutput

ENTRIES = [name for name in PeerScheduler().config if not name.startswith("_")]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

configs = st.fixed_dictionaries(
    {},
    optional={
        "num_train_timesteps": st.sampled_from([1000, 100, 37]),
        "beta_start": st.floats(0.00005, 0.001),
        "beta_end": st.floats(0.01, 0.03),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "clip_sample": st.booleans(),
        "set_alpha_to_one": st.booleans(),
        "steps_offset": st.sampled_from([0, 1, 2]),
        "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
        "thresholding": st.booleans(),
        "dynamic_thresholding_ratio": st.floats(0.5, 1.0),
        "clip_sample_range": st.floats(0.5, 3.0),
        "sample_max_value": st.floats(1.0, 3.0),
        "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
        "rescale_betas_zero_snr": st.booleans(),
    },
)


def both(config, steps=None):
    """Our scheduler and diffusers', with their timesteps set."""
    ours, peer = DDIMScheduler(**config), PeerScheduler(**config)
    if steps is not None:
        steps = min(steps, ours.config.num_train_timesteps)
        stride = ours.config.num_train_timesteps // steps
        reach = (steps - 1) * stride + ours.config.steps_offset
        assume(ours.config.timestep_spacing != "leading" or reach < ours.config.num_train_timesteps)
        ours.set_timesteps(steps)
        peer.set_timesteps(steps)
    return ours, peer


def says_nothing(scheduler, timestep):
    """Whether the predicted noise leaves x₀ undefined at `timestep`, which ours refuses: see TestZeroSignal."""
    config = scheduler.config
    clips = config.clip_sample and not config.thresholding
    return config.prediction_type == "epsilon" and scheduler.alphas_cumprod[timestep] == 0 and not clips


def same_or_peer_nan(ours, peer):
    """Equal to the bit; where rounding errors made diffusers' value NaN, ours is finite."""
    same(ours.where(~peer.isnan(), peer), peer)
    assert not ours.isnan().any()


def same(ours, peer):
    torch.testing.assert_close(ours, peer, rtol=0, atol=0, equal_nan=True)


def normal(seed, shape=(2, 3, 4, 5), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TestParity:
    @settings(max_examples=60, deadline=None)
    @given(configs, st.integers(1, 1000))
    def test_schedules_and_timesteps(self, config, steps):
        ours, peer = both(config)
        same(ours.timesteps, peer.timesteps)
        assert len(ours) == len(peer)
        assert (ours.order, ours.init_noise_sigma) == (peer.order, peer.init_noise_sigma)
        ours, peer = both(config, steps)
        assert ours.num_inference_steps == peer.num_inference_steps
        for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
            same(getattr(ours, name), getattr(peer, name))
        # For some numbers of steps diffusers' "trailing" has one timestep too many, and it is -1.
        same(ours.timesteps, peer.timesteps[: ours.num_inference_steps])

    @settings(max_examples=100, deadline=None)
    @given(
        configs,
        st.integers(1, 1000),
        st.data(),
        st.floats(0, 1),
        st.sampled_from(DTYPES),
        st.sampled_from([True, False, None]),
        st.booleans(),
    )
    def test_step(self, config, steps, data, eta, dtype, clipped, drawn):
        ours, peer = both(config, steps)
        timestep = data.draw(st.sampled_from(ours.timesteps.tolist()))
        assume(not says_nothing(ours, timestep))
        sample, output = normal(1, dtype=dtype), normal(2, dtype=dtype)
        results = []
        for scheduler in (ours, peer):
            noise = {"generator": torch.Generator().manual_seed(3)} if drawn else {"variance_noise": normal(4)}
            results.append(
                scheduler.step(output, timestep, sample, eta=eta, use_clipped_model_output=clipped, **noise)
            )
        for name in ("prev_sample", "pred_original_sample"):
            same_or_peer_nan(getattr(results[0], name), getattr(results[1], name))
        variance = peer._get_variance(timestep, timestep - len(peer) // peer.num_inference_steps)
        same(ours._get_variance(timestep, timestep - len(ours) // ours.num_inference_steps), variance)

    @settings(max_examples=20, deadline=None)
    @given(configs, st.integers(2, 12), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
    def test_whole_trajectories(self, config, steps, eta, clipped):
        ours, peer = both(config, steps)
        assume(len(ours.timesteps) == len(peer.timesteps) and not says_nothing(ours, ours.timesteps[0]))
        ends = []
        for scheduler in (ours, peer):
            sample, generators = normal(5), [torch.Generator().manual_seed(seed) for seed in (6, 7)]
            for timestep in scheduler.timesteps:
                output = torch.tanh(1.5 * sample + timestep / 1000)
                sample = scheduler.step(
                    output, timestep, sample, eta=eta, use_clipped_model_output=clipped, generator=generators
                ).prev_sample
            ends.append(sample)
        same_or_peer_nan(*ends)

    @settings(max_examples=30, deadline=None)
    @given(configs, st.data(), st.sampled_from(DTYPES), st.sampled_from([(3,), (3, 1, 4, 4)]))
    def test_adding_noise_and_velocity(self, config, data, dtype, shape):
        ours, peer = both(config)
        timesteps = torch.tensor(data.draw(st.lists(st.integers(0, len(ours) - 1), min_size=3, max_size=3)))
        image, noise = normal(8, shape, dtype), normal(9, shape, dtype)
        same(ours.add_noise(image, noise, timesteps), peer.add_noise(image, noise, timesteps))
        same(ours.add_noise(image, noise, timesteps[0]), peer.add_noise(image, noise, timesteps[0]))
        same(ours.get_velocity(image, noise, timesteps), peer.get_velocity(image, noise, timesteps))

    @pytest.mark.filterwarnings("ignore:To copy construct")
    @pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
    def test_own_betas(self, kind):
        values = np.linspace(0.01, 0.3, 20).tolist()
        ours = DDIMScheduler(20, trained_betas=kind(values))
        same(ours.alphas_cumprod, PeerScheduler(20, trained_betas=kind(values)).alphas_cumprod)
        stored = json.loads(json.dumps(ours.config.trained_betas))
        assert stored == pytest.approx(values)
        same(DDIMScheduler(20, trained_betas=stored).betas, ours.betas)

    def test_step_returns_a_tuple_and_an_output(self):
        ours, _ = both({}, 10)
        sample, output = normal(1), normal(2)
        result = ours.step(output, 900, sample)
        assert isinstance(result, DDIMSchedulerOutput)
        previous, original = ours.step(output, 900, sample, return_dict=False)
        same(result[0], previous)
        same(result["pred_original_sample"], original)
        assert ours.scale_model_input(sample, 900) is sample

    def test_a_step_off_the_schedule_goes_down_one_stride(self):
        ours, peer = both({}, 10)
        same(ours.step(normal(1), 333, normal(2)).prev_sample, peer.step(normal(1), 333, normal(2)).prev_sample)


class TestConfig:
    @settings(max_examples=25, deadline=None)
    @given(configs)
    def test_configs_go_to_diffusers_and_back(self, config):
        ours, peer = both(config)
        there = PeerScheduler.from_config(ours.config)
        back = DDIMScheduler.from_config(peer.config)
        assert list(ours.config)[:15] == ENTRIES
        for name in ENTRIES:
            assert ours.config[name] == peer.config[name] == there.config[name] == back.config[name]
        same(back.alphas_cumprod, there.alphas_cumprod)

    @pytest.mark.parametrize("kind", [DDPMScheduler, PNDMScheduler])
    def test_other_schedulers_convert_as_in_diffusers_without_a_warning(self, kind, caplog):
        config = kind(beta_schedule="scaled_linear", steps_offset=1).config
        converted = DDIMScheduler.from_config(config, prediction_type="v_prediction")
        peer = PeerScheduler.from_config(config, prediction_type="v_prediction")
        assert {name: converted.config[name] for name in ENTRIES} == {name: peer.config[name] for name in ENTRIES}
        assert not caplog.records

    def test_what_only_other_schedulers_use_stays_in_the_config(self, caplog):
        stored = {
            "_class_name": "DDPMScheduler",
            "_diffusers_version": "0.1.1",
            "beta_end": 0.03,
            "timestep_values": None,
            "variance_type": "fixed_large",
        }
        config = DDIMScheduler.from_config(stored).config
        assert config.beta_end == 0.03
        assert config.variance_type == "fixed_large"
        assert config._class_name == "DDIMScheduler"
        assert config._diffusers_version == "0.1.1"
        assert not caplog.records

    def test_a_config_older_than_prediction_types(self):
        assert DDIMScheduler.from_config({"predict_epsilon": False}).config.prediction_type == "sample"
        assert DDIMScheduler.from_config({"predict_epsilon": True}).config.prediction_type == "epsilon"

    def test_unknown_entries_are_kept_and_warned_about_once(self, caplog):
        for _ in range(2):
            scheduler = DDIMScheduler.from_config({"wobble_of_this_test": 3})
            assert scheduler.config.wobble_of_this_test == 3
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "wobble_of_this_test" in record.message

    def test_a_scheduler_is_copied_and_pickled_with_its_timesteps(self):
        scheduler = DDIMScheduler(timestep_spacing="quad")
        scheduler.set_timesteps(7)
        expected = scheduler.step(normal(1), scheduler.timesteps[2], normal(2)).prev_sample
        for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
            assert twin.config == scheduler.config
            same(twin.step(normal(1), twin.timesteps[2], normal(2)).prev_sample, expected)


class TestExtensions:
    @settings(max_examples=40, deadline=None)
    @given(st.sampled_from([10, 37, 1000]), st.integers(1, 1000), st.sampled_from([0, 1]))
    def test_quad_follows_the_original_code_and_never_repeats(self, count, steps, offset):
        assume(steps + offset <= count)
        scheduler = DDIMScheduler(count, timestep_spacing="quad", steps_offset=offset)
        scheduler.set_timesteps(steps)
        entries = (scheduler.timesteps.flip(0) - offset).tolist()
        original = [int(value) for value in np.linspace(0, np.sqrt(count * 0.8), steps) ** 2]
        assert len(entries) == steps
        assert entries[0] == 0
        for index in range(1, steps):
            assert entries[index] > entries[index - 1]
            assert entries[index] == max(original[index], entries[index - 1] + 1)

    @pytest.mark.parametrize(
        ("config", "schedule"),
        [
            ({"timestep_spacing": "quad"}, {"num_inference_steps": 9}),
            ({}, {"timesteps": [999, 700, 350, 20, 3]}),
            ({"timestep_spacing": "linspace", "previous_timestep": "schedule"}, {"num_inference_steps": 7}),
            ({"timestep_spacing": "trailing", "previous_timestep": "schedule"}, {"num_inference_steps": 7}),
            ({"timestep_spacing": "leading"}, {"num_inference_steps": 10}),
        ],
    )
    def test_a_step_lands_on_the_noise_level_of_the_next_timestep(self, config, schedule):
        """With the true noise for a model every sample on the way is sqrt(ᾱ) x₀ + sqrt(1 - ᾱ) ε, and the end is x₀."""
        scheduler = DDIMScheduler(**config)
        scheduler.set_timesteps(**schedule)
        image, noise = normal(1).clamp(-1, 1), normal(2)
        sample = scheduler.add_noise(image, noise, scheduler.timesteps[:1])
        for timestep in scheduler.timesteps:
            expected = scheduler.add_noise(image, noise, timestep)
            torch.testing.assert_close(sample, expected, rtol=0, atol=1e-4)
            sample = scheduler.step(noise, timestep, sample).prev_sample
        torch.testing.assert_close(sample, image, rtol=0, atol=1e-4)

    def test_the_default_stride_is_not_the_next_entry_of_uneven_spacings(self):
        results = []
        for previous in ("stride", "schedule"):
            scheduler = DDIMScheduler(timestep_spacing="linspace", previous_timestep=previous)
            scheduler.set_timesteps(7)
            results.append([scheduler.step(normal(1), t, normal(2)).prev_sample for t in scheduler.timesteps])
        assert [torch.equal(*pair) for pair in zip(*results, strict=True)] == [False] * 6 + [True]

    @pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor])
    def test_own_timesteps_of_any_kind(self, kind):
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(timesteps=kind([900, 20, 0]))
        assert scheduler.timesteps.tolist() == [900, 20, 0]
        assert scheduler.timesteps.dtype == torch.int64
        assert scheduler.num_inference_steps == 3

    def test_an_even_schedule_follows_an_own_one(self):
        scheduler, fresh = DDIMScheduler(), DDIMScheduler()
        scheduler.set_timesteps(timesteps=[900, 20, 0])
        for each in (scheduler, fresh):
            each.set_timesteps(10)
        same(scheduler.step(normal(1), 333, normal(2)).prev_sample, fresh.step(normal(1), 333, normal(2)).prev_sample)

    def test_trailing_never_steps_below_zero(self):
        scheduler = DDIMScheduler(timestep_spacing="trailing")
        for steps in range(1, 1001, 15):
            scheduler.set_timesteps(steps)
            assert len(scheduler.timesteps) == steps
            assert scheduler.timesteps.min() >= 0


class TestRounding:
    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        st.sampled_from(["leading", "linspace", "trailing", "quad"]),
        st.booleans(),
        st.sampled_from([1000, 100, 37, 4]),
        st.integers(1, 1000),
        st.floats(0, 1.2),
    )
    def test_coefficients_are_finite_for_every_schedule_and_eta(self, betas, spacing, rescale, count, steps, eta):
        scheduler = DDIMScheduler(
            count,
            beta_schedule=betas,
            timestep_spacing=spacing,
            rescale_betas_zero_snr=rescale,
            prediction_type="v_prediction",
        )
        for each in (eta, 1.0):
            table = scheduler.step_table(min(steps, count), each)
            assert torch.isfinite(table.values).all()
            assert (table.column("c_direction") >= 0).all()

    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_a_first_beta_of_zero_adds_no_noise_at_the_end(self, eta):
        scheduler = DDIMScheduler(10, beta_start=0.0)
        assert torch.isfinite(scheduler.step_table(10, eta).values).all()
        scheduler.set_timesteps(10)
        sample = normal(1)
        assert torch.equal(scheduler.step(normal(2), 0, sample, eta=eta).prev_sample, sample.clamp(-1, 1))


class TestZeroSignal:
    """Where rescaled βs leave no signal, the predicted noise cannot tell x₀."""

    def build(self, **changes):
        return DDIMScheduler(**{"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **changes})

    def test_unclipped_it_is_refused_by_the_names_of_the_settings(self):
        scheduler = self.build(clip_sample=False)
        with pytest.raises(ValueError, match=r"rescale_betas_zero_snr=True.*999.*prediction_type='epsilon'"):
            scheduler.step_table(3, 0.0)
        scheduler.set_timesteps(3)
        with pytest.raises(ValueError, match="timestep_spacing='leading'"):
            scheduler.step(normal(1), 999, normal(2))
        assert torch.isfinite(scheduler.step(normal(1), 666, normal(2)).prev_sample).all()

    @pytest.mark.parametrize(
        "changes",
        [{"prediction_type": "v_prediction"}, {"prediction_type": "sample"}, {"timestep_spacing": "leading"}],
    )
    def test_what_the_message_advises_works(self, changes):
        scheduler = self.build(**{"clip_sample": False, **changes})
        scheduler.set_timesteps(3)
        for timestep in scheduler.timesteps:
            assert torch.isfinite(scheduler.step(normal(1), timestep, normal(2), eta=1.0).prev_sample).all()

    def test_clipped_it_goes_on_as_in_diffusers(self):
        ours, peer = both({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 3)
        same(ours.step(normal(1), 999, normal(2)).prev_sample, peer.step(normal(1), 999, normal(2)).prev_sample)


class TestErrors:
    def test_sampling_beyond_the_own_betas(self):
        scheduler = DDIMScheduler(trained_betas=[0.1, 0.3])
        for sample in (scheduler.set_timesteps, lambda steps: scheduler.step_table(steps, 0.0)):
            with pytest.raises(ValueError, match=r"trained_betas has 2 entries.*num_train_timesteps=2"):
                sample(10)

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"prediction_type": "flow"}, ValueError, "prediction_type must be one of epsilon.*'flow'"),
            ({"timestep_spacing": "random"}, ValueError, "timestep_spacing.*quad.*'random'"),
            ({"previous_timestep": "t-1"}, ValueError, "previous_timestep.*stride.*'t-1'"),
            ({"beta_schedule": "sigmoid"}, NotImplementedError, "beta_schedule.*scaled_linear.*'sigmoid'"),
            ({"beta_end": -1.0}, ValueError, "beta_end must be a number from 0 to .*-1.0"),
            ({"beta_start": float("nan")}, ValueError, "beta_start.*nan"),
            ({"trained_betas": []}, ValueError, "trained_betas must be a list of numbers"),
            ({"trained_betas": [[0.1, 0.2]]}, ValueError, "trained_betas must be a list.*1, 2"),
            ({"num_train_timesteps": 2, "trained_betas": [0.1, -0.2]}, ValueError, "trained_betas.*-0.2"),
            (
                {"num_train_timesteps": 0},
                ValueError,
                "num_train_timesteps must be a whole number from 1 .*, got 0",
            ),
        ],
    )
    def test_building(self, arguments, kind, message):
        with pytest.raises(kind, match=message):
            DDIMScheduler(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({}, ValueError, "num_inference_steps is None"),
            ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be 1 to.*1000, got 0"),
            ({"num_inference_steps": 1001}, ValueError, "num_inference_steps must be 1 to.*1000, got 1001"),
            ({"num_inference_steps": 10.5}, TypeError, "num_inference_steps must be an integer, got 10.5"),
            ({"num_inference_steps": 2, "timesteps": [5]}, ValueError, "timesteps has 1 entries.*only one"),
            ({"timesteps": []}, ValueError, "timesteps is empty"),
            ({"timesteps": [5, 5]}, ValueError, "timesteps must strictly decrease, but 5 follows 5"),
            ({"timesteps": [1000, 5]}, ValueError, "timesteps must lie in 0 to .*999, got 1000"),
            ({"timesteps": [5, -1]}, ValueError, "timesteps must lie in 0 to .*999, got -1"),
            ({"timesteps": [5.0, 1.0]}, TypeError, "timesteps must be a sequence of integers"),
            ({"timesteps": 5}, TypeError, "timesteps must be a sequence of integers"),
        ],
    )
    def test_setting_timesteps(self, arguments, kind, message):
        scheduler = DDIMScheduler()
        with pytest.raises(kind, match=message):
            scheduler.set_timesteps(**arguments)
        assert scheduler.num_inference_steps is None

    def test_an_offset_beyond_the_training_timesteps(self):
        with pytest.raises(ValueError, match=r"steps_offset=1 and num_inference_steps=1000.*fewer steps"):
            DDIMScheduler(steps_offset=1).set_timesteps(1000)

    def test_a_step_before_set_timesteps(self):
        with pytest.raises(ValueError, match="call set_timesteps"):
            DDIMScheduler().step(normal(1), 5, normal(2))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"timestep": 1000}, "timestep must be 0 to 999, got 1000"),
            ({"timestep": -1}, "timestep must be 0 to 999, got -1"),
            ({"timestep": 899}, "timestep 899 is not in the schedule.*900, 20"),
            ({"eta": float("nan")}, "eta must be a finite number.*nan"),
            ({"model_output": normal(1, (2, 6, 4, 5))}, r"model_output has the shape \(2, 6, 4, 5\)"),
            (
                {"eta": 0.5, "generator": torch.Generator(), "variance_noise": normal(1)},
                "generator and variance_noise exclude each other",
            ),
        ],
    )
    def test_steps(self, change, message):
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(timesteps=[900, 20])
        arguments = {"model_output": normal(1), "timestep": 900, "sample": normal(2)} | change
        with pytest.raises(ValueError, match=message):
            scheduler.step(**arguments)
