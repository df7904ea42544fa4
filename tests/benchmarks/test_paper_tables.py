"""The paper's tables at a small size: rows are measured once, kept and reported; and the judge's arithmetic."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """1,100 pictures in Keras's layout, of ten kinds: a bright bar at one of ten heights, and grain."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 1100).astype(np.uint8)
    images = random.integers(0, 30, (1100, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 3 : 2 * label + 6, 4:24] = 255
    file = tmp_path_factory.mktemp("data") / "mnist.npz"
    np.savez(file, x_train=images, y_train=labels)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
    )
    folder = tmp_path_factory.mktemp("model")
    DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return tmp_path_factory.mktemp("judge") / "judge.safetensors"


@pytest.fixture
def run(data, model, judge, tmp_path):
    """Run the command on the small model; its report is at `tmp_path / "tables.md"`."""
    import paper_tables

    def command(*arguments):
        fixed = ["--data", str(data), "--model", str(model), "--out", str(tmp_path / "tables"), "--device", "cpu"]
        paper_tables.main([*fixed, "--judge", str(judge), "--images", "6", *arguments])

    return command


def test_the_command_measures_each_row_and_reports_it(run, tmp_path, capsys):
    run("--tables", "distance,frontier", "--steps", "10", "--samplers", "eta 0,eta 1,quad", "--repeats", "2")
    rows = json.loads((tmp_path / "tables.json").read_text())["rows"]
    names = [f"{name}, 10 steps" for name in ("eta 0", "eta 1", "quad")]
    assert sorted(rows) == sorted(f"samples: {name}, seeds {seed}" for name in names for seed in (0, 1))
    printed = capsys.readouterr().out
    report = (tmp_path / "tables.md").read_text()
    for row, values in rows.items():
        assert f"{row}: distance {values['distance']:.4g}" in printed
        assert values["distance"] > 0 and values["seconds"] > 0 and 0 <= values["confident"] <= 1
    pair = [rows[f"samples: eta 1, 10 steps, seeds {seed}"]["distance"] for seed in (0, 1)]
    assert f"| η 1 | {np.mean(pair):.1f} ± {abs(pair[0] - pair[1]) / 2:.1f} (41.07) |" in report
    assert "not measured" in report, "the rows left out must be seen to be missing"


def test_a_second_run_measures_only_what_is_missing(run, tmp_path, capsys):
    few = ("--tables", "distance", "--samplers", "eta 0", "--repeats", "1")
    run(*few, "--steps", "10")
    first = json.loads((tmp_path / "tables.json").read_text())["rows"]
    capsys.readouterr()
    run(*few, "--steps", "10,20")
    printed = capsys.readouterr().out
    assert "eta 0, 20 steps" in printed and "eta 0, 10 steps" not in printed
    second = json.loads((tmp_path / "tables.json").read_text())["rows"]
    assert second.items() > first.items()


def test_rows_of_other_settings_are_not_mixed(run, tmp_path):
    few = ("--tables", "distance", "--samplers", "eta 0", "--repeats", "1", "--steps", "10")
    run(*few)
    before = (tmp_path / "tables.json").read_bytes()
    with pytest.raises(SystemExit, match=r"images=6, this run has 7.*--out"):
        run(*few, "--images", "7")
    assert (tmp_path / "tables.json").read_bytes() == before


@pytest.mark.parametrize("arguments", [("--tables", "fid"), ("--samplers", "eta 3"), ("--images", "1")])
def test_what_is_unknown_is_refused_before_any_work(run, tmp_path, arguments, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert arguments[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rows_that_this_version_cannot_measure_are_named():
    from paper_rows import all_rows, missing

    class Old:
        def __call__(self, batch_size=1, eta=0.0):
            pass

    class New(Old):
        def __call__(self, batch_size=1, eta=0.0, variance=None, solver_order=1):
            pass

        def invert(self, images):
            pass

    reasons = {row.sampler: missing(row, Old) for row in all_rows()}
    assert "variance" in reasons["eta σ̂"] and "solver_order" in reasons["order 2"] and "invert" in reasons["inversion"]
    assert reasons["eta 0.5"] is None and reasons["quad"] is None
    assert not any(missing(row, New) for row in all_rows())


def test_a_row_whose_value_is_refused_is_named_and_other_errors_are_not_hidden(run, tmp_path, monkeypatch, capsys):
    import paper_rows
    import paper_tables

    def refuse(*args):
        raise ValueError(said)

    monkeypatch.setattr(paper_tables, "missing", lambda row, pipeline: None)
    monkeypatch.setattr(paper_tables, "measure_distance", refuse)
    one = (
        "--tables",
        "distance",
        "--samplers",
        f"eta {paper_rows.LARGER_VARIANCE}",
        "--steps",
        "10",
        "--repeats",
        "1",
    )
    said = "variance must be 'learned_range' or None, got 'ddpm_noisy'"
    run(*one)
    assert f"missing: {said}" in capsys.readouterr().out
    assert "| η σ̂ | not measured (367.43)" in (tmp_path / "tables.md").read_text()
    said = "images are NaN"
    with pytest.raises(ValueError, match="images are NaN"):
        run(*one)


def test_the_tables_have_the_papers_rows():
    from paper_rows import all_rows

    distances = {(row.sampler, row.steps) for row in all_rows() if "distance" in row.tables}
    names = ("eta 0", "eta 0.2", "eta 0.5", "eta 1", "eta σ̂")
    assert distances == {(name, steps) for name in names for steps in (10, 20, 50, 100)} | {
        (name, 1000) for name in ("eta 0", "eta 1", "eta σ̂")
    }


def test_the_report_says_whether_a_trend_shows():
    from paper_report import fewest_steps, trends

    def sample(distance, seconds):
        return {"distance": distance, "confident": 0.9, "seconds": seconds}

    etas = ("eta 0", "eta 0.2", "eta 0.5", "eta 1")
    rows = {f"samples: {name}, 10 steps, seeds 0": sample(20.0 + rank, 10.0) for rank, name in enumerate(etas)}
    rows["samples: eta σ̂, 10 steps, seeds 0"] = sample(21.0, 10.0)
    rows["samples: eta 0, 50 steps, seeds 0"] = sample(15.0, 50.0)
    rows["samples: order 2, 12 steps, seeds 0"] = sample(14.0, 12.5)
    smaller, noisy = trends(rows)
    assert "smaller η is better: shows" in smaller and "η 0.2" not in noisy
    assert "bad at S = 10: does not show (21.0 against 20.0" in noisy
    assert "order 2 with 12 steps (14.0) at 4.0 times" in fewest_steps(rows)
    rows["samples: eta 1, 10 steps, seeds 0"] = sample(1.0, 10.0)
    assert "smaller η is better: does not show" in trends(rows)[0]


def test_the_distance_of_shifted_and_of_widened_features_is_the_formulas():
    from digit_judge import frechet_distance

    features = torch.randn(400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([1.0, 0, 2.0, 0, 0], dtype=torch.float64)
    assert frechet_distance(features, features + shift) == pytest.approx(5.0)
    wider = frechet_distance(features, 3 * (features - features.mean(0)) + features.mean(0))
    assert wider == pytest.approx(4 * torch.cov(features.T).trace().item())
    few = features[:3]
    assert np.isfinite(frechet_distance(few, features)), "a covariance without full rank has a root too"
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(features[:1], features)


def test_the_judge_is_the_same_whatever_the_threads_and_is_kept(data, tmp_path):
    from digit_judge import load_digits, stored_judge, train_judge

    train, held_out = load_digits(data)
    threads = torch.get_num_threads()
    random_state = torch.random.get_rng_state()
    judge = train_judge(train, epochs=8)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    torch.set_num_threads(3)
    try:
        again = train_judge(train, epochs=8)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(judge.probabilities(held_out.images), again.probabilities(held_out.images)) is True
    assert judge.right(held_out.images, held_out.labels) > 0.5

    file = tmp_path / "judge.safetensors"
    kept = stored_judge(file, train, train=lambda digits: judge)
    loaded = stored_judge(file, train, train=lambda digits: pytest.fail("trained again"))
    assert torch.equal(kept.features(held_out.images), loaded.features(held_out.images))
    other = stored_judge(file, train[:50], train=lambda digits: again)
    assert other is again, "a judge of other digits must not be taken"
