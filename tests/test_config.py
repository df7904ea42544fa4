"""Configs: what an object was built with, its methods as diffusers has them, and where it goes from there."""

import copy
import json
import pickle
import warnings

import diffusers
import numpy as np
import pytest
from diffusers.training_utils import EMAModel
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast import DDIMScheduler, UNet2DModel
from ddim_fast.config import Configured, register_to_config

UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
OTHERS = [
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
]
choices = st.fixed_dictionaries(
    {},
    optional={
        "num_train_timesteps": st.sampled_from([1000, 100]),
        "beta_schedule": st.sampled_from(["linear", "squaredcos_cap_v2"]),
        "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
        "clip_sample": st.booleans(),
        "steps_offset": st.sampled_from([0, 1]),
        "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
        "rescale_betas_zero_snr": st.booleans(),
    },
)


@pytest.fixture(params=["unet", "scheduler"])
def built(request):
    """A network and a scheduler, small, with what they were built from."""
    return UNet2DModel(**UNET) if request.param == "unet" else DDIMScheduler(beta_end=0.03)


class Base(Configured):
    config_name = "base.json"

    @register_to_config
    def __init__(self, width=1, depth=2, name="a"):
        self.size = width * depth


class Derived(Base):
    @register_to_config
    def __init__(self, extra=5, width=7, **others):
        super().__init__(width=width, **others)


class TestEntries:
    def test_a_fresh_config_is_that_of_diffusers(self):
        for ours, theirs in (
            (DDIMScheduler(beta_end=0.03), diffusers.DDIMScheduler(beta_end=0.03)),
            (UNet2DModel(**UNET), diffusers.UNet2DModel(**UNET)),
        ):
            left, right = dict(ours.config), dict(theirs.config)
            assert set(left.pop("_use_default_values")) == set(right.pop("_use_default_values"))
            assert left == right

    def test_what_diffusers_has_no_name_for_appears_once_it_is_chosen(self):
        assert "previous_timestep" not in DDIMScheduler(previous_timestep="stride").config
        assert DDIMScheduler(previous_timestep="schedule").config.previous_timestep == "schedule"

    def test_a_subclass_with_arguments_of_its_own_has_all_of_them(self):
        derived = Derived(depth=4)
        assert dict(derived.config) == {
            "extra": 5,
            "width": 7,
            "depth": 4,
            "name": "a",
            "_use_default_values": ["extra", "width", "name"],
        }
        assert derived.size == 28
        again = Derived.from_config(derived.config, name="b")
        assert type(again) is Derived
        assert (again.size, again.config.name, again.config.extra) == (28, "b", 5)

    def test_private_entries_of_a_file_may_stay_in_its_arguments(self, built):
        entries = {**json.loads(built.to_json_string()), "_class_name": "Old", "_diffusers_version": "0.1.0"}
        twin = type(built)(**entries)
        assert (twin.config["_class_name"], twin.config["_diffusers_version"]) == ("Old", "0.1.0")
        with pytest.raises(TypeError, match="wobble"):
            type(built)(**entries, wobble=1)

    def test_assignment_is_refused_with_the_way_that_keeps_the_object(self, built):
        name = next(iter(built.config))
        for assign in (lambda: setattr(built.config, name, 3), lambda: built.config.__setitem__(name, 3)):
            with pytest.raises(TypeError, match=r"register_to_config\(name=value\)"):
                assign()
        built.register_to_config(**{name: 16})
        assert built.config[name] == 16 == type(built).from_config(built.config).config[name]

    def test_an_entry_read_from_the_object_itself_warns(self, built):
        built.register_to_config(of_this_test=5)
        with pytest.warns(FutureWarning, match="config.of_this_test"):
            assert built.of_this_test == 5
        with pytest.raises(AttributeError, match="object has no attribute 'nothing_like_it'"):
            _ = built.nothing_like_it
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert hasattr(built, "save_config") and not hasattr(built, "nothing_like_it")
            twins = copy.deepcopy(built), pickle.loads(pickle.dumps(built))
        assert all(twin.config == built.config for twin in twins)


class TestFromConfig:
    @settings(max_examples=25, deadline=None)
    @given(choices, st.sampled_from(OTHERS))
    def test_another_scheduler_keeps_its_defaults_for_what_nobody_chose(self, chosen, name):
        other = getattr(diffusers, name)
        ours = other.from_config(DDIMScheduler(**chosen).config).config
        theirs = other.from_config(diffusers.DDIMScheduler(**chosen).config).config
        assert {key: ours[key] for key in theirs if not key.startswith("_")} == {
            key: value for key, value in theirs.items() if not key.startswith("_")
        }

    @pytest.mark.parametrize("name", OTHERS)
    def test_going_to_another_scheduler_and_back_changes_nothing_and_warns_of_nothing(self, name, caplog):
        scheduler = DDIMScheduler(beta_end=0.03, prediction_type="v_prediction")
        back = DDIMScheduler.from_config(getattr(diffusers, name).from_config(scheduler.config).config)
        assert {key: back.config[key] for key in scheduler.config} == dict(scheduler.config)
        assert not caplog.records

    def test_what_was_registered_later_is_chosen(self):
        scheduler = DDIMScheduler()
        scheduler.register_to_config(timestep_spacing="trailing")
        assert DDIMScheduler.from_config(scheduler.config).config.timestep_spacing == "trailing"

    def test_unused_arguments_come_back(self, built, caplog):
        twin, unused = type(built).from_config(built.config, return_unused_kwargs=True, mine=3)
        assert unused == {"mine": 3} and "mine" not in twin.config
        assert not caplog.records

    def test_a_path_is_read_with_a_warning(self, built, tmp_path):
        built.save_config(tmp_path)
        with pytest.warns(FutureWarning, match="load_config"):
            twin = type(built).from_config(str(tmp_path))
        assert twin.config == built.load_config(tmp_path)

    @pytest.mark.parametrize("wrong", [None, 3, ["a"]])
    def test_neither_a_mapping_nor_a_path(self, built, wrong):
        with pytest.raises(TypeError, match="config must be a mapping"):
            type(built).from_config(wrong)


class TestFiles:
    def test_a_saved_config_is_loaded_here_and_in_diffusers(self, built, tmp_path):
        built.save_config(tmp_path)
        assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [built.config_name]
        loaded = type(built).load_config(tmp_path)
        theirs = getattr(diffusers, type(built).__name__)
        assert loaded == theirs.load_config(tmp_path)
        assert type(built).load_config(tmp_path / built.config_name) == loaded
        twin = type(built).from_config(loaded)
        public = {key: value for key, value in theirs.from_config(loaded).config.items() if key[0] != "_"}
        assert {key: twin.config[key] for key in public} == public

    def test_the_config_of_a_part_of_a_pipeline(self, built, tmp_path):
        folder = tmp_path / ("unet" if isinstance(built, UNet2DModel) else "scheduler")
        built.save_config(folder)
        for place, options in ((tmp_path, {}), (tmp_path, {"subfolder": folder.name}), (folder, {})):
            loaded, unused = type(built).load_config(place, return_unused_kwargs=True, mine=3, **options)
            assert loaded["_class_name"] == type(built).__name__ and unused == {"mine": 3}
        with pytest.raises(TypeError, match="mine"):
            type(built).load_config(tmp_path, mine=3)

    def test_saving_a_config_leaves_weights_alone(self, tmp_path):
        unet = UNet2DModel(**UNET)
        unet.save_pretrained(tmp_path)
        weights = next(tmp_path.glob("*.safetensors")).read_bytes()
        unet.register_to_config(sample_size=16)
        unet.save_config(tmp_path)
        assert next(tmp_path.glob("*.safetensors")).read_bytes() == weights
        assert UNet2DModel.from_pretrained(tmp_path).config.sample_size == 16

    def test_a_file_in_place_of_a_folder(self, built, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(NotADirectoryError, match="file"):
            built.save_config(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

    def test_options_of_an_upload_that_was_not_asked_for(self, built, tmp_path):
        with pytest.raises(TypeError, match=r"repo_id.*push_to_hub=True"):
            built.save_config(tmp_path, repo_id="me/mine")

    def test_values_of_numpy_and_paths_become_json(self, tmp_path):
        scheduler = DDIMScheduler(num_train_timesteps=3, trained_betas=np.array([0.1, 0.2, 0.3]))
        scheduler.register_to_config(origin=tmp_path, count=np.int64(3))
        stored = json.loads(scheduler.to_json_string())
        assert (stored["trained_betas"], stored["origin"], stored["count"]) == ([0.1, 0.2, 0.3], str(tmp_path), 3)
        assert repr(scheduler) == f"DDIMScheduler {scheduler.to_json_string()}"

    def test_a_moving_average_is_saved_and_resumed(self, tmp_path):
        unet = UNet2DModel(**UNET)
        average = EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config, decay=0.9)
        average.step(unet.parameters())
        average.save_pretrained(tmp_path)
        resumed = EMAModel.from_pretrained(tmp_path, UNet2DModel)
        assert (resumed.decay, resumed.optimization_step) == (0.9, 1)
        for ours, theirs in zip(resumed.shadow_params, average.shadow_params, strict=True):
            assert ours.equal(theirs)


def test_compatible_classes_are_ours_and_those_of_diffusers_that_can_be_built():
    scheduler = DDIMScheduler()
    kinds = scheduler.compatibles
    assert kinds[0] is DDIMScheduler and diffusers.UniPCMultistepScheduler in kinds
    for kind in kinds:
        assert kind.from_config(scheduler.config).config.num_train_timesteps == 1000
