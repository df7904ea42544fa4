"""`ddim-fast generate` and `ddim-fast verify` as they are typed."""

import dataclasses
import json
import os
import re
import signal
import sys
import time

import pytest
from click.testing import CliRunner
from fake_jobs import FakePipeline, make, tree

from ddim_fast.generation import JobError, JobSettings, generate, plan, verify
from ddim_fast.generation.commands import generate_command, verify_command


@pytest.fixture
def model(monkeypatch):
    """What the name `MODEL` loads."""
    pipe = FakePipeline(classes=10)
    load = plan.load_pipeline
    monkeypatch.setattr(
        "ddim_fast.generation.run.load_pipeline",
        lambda name, *how: pipe if name == "MODEL" else load(name, *how),
    )
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    return pipe


def run(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_images_a_contact_sheet_and_a_report(tmp_path, model):
    result = run(generate_command, "MODEL", "--seeds", "5,7-9", "--class", 3, "--batch", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    names = {"000005.png", "000007.png", "000008.png", "000009.png", "grid.png", "metadata.jsonl", "job.json"}
    assert {name for name in os.listdir(tmp_path) if not name.startswith(".")} == names
    assert "4 of 4 images" in result.output
    assert "images/s" in result.output
    assert run(verify_command, tmp_path).exit_code == 0


def test_by_default_the_seeds_are_0_to_63(tmp_path, model):
    assert run(generate_command, "MODEL", "--class", "uniform", "--out", tmp_path).exit_code == 0
    assert verify(tmp_path).total == 64


def test_labels_come_from_a_file(tmp_path, model):
    (tmp_path / "labels.txt").write_text("1\n2\n3\n")
    out = tmp_path / "out"
    result = run(generate_command, "MODEL", "--seeds", "0-2", "--labels", tmp_path / "labels.txt", "--out", out)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [1, 2, 3]


def test_progress_as_json_lines(tmp_path, model):
    result = run(generate_command, "MODEL", "--class", 1, "--out", tmp_path, "--log-json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == ["start", "progress", "done"]
    model.bad = {40}
    arguments = ("--class", 1, "--batch", 8, "--chunk-size", 8, "--out", tmp_path / "bad", "--log-json")
    result = run(generate_command, "MODEL", *arguments)
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["event"], last["done"], last["total"]) == ("stopped", 40, 64)
    assert "seeds 40" in last["reason"]


def test_a_shard_says_where_it_was_read(tmp_path, model, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(generate_command, "MODEL", "--class", 1, "--batch", 8, "--chunk-size", 8, "--out", tmp_path)
    assert "shard 1/2, from RANK and WORLD_SIZE" in result.output
    assert "32 of 32 in shard 1/2" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "9-3"), "runs backwards"),
        (("--class", "dog"), "--class must be a number or uniform, got 'dog'"),
        (("--class", "10"), "0 to 9"),
        ((), "--class is missing, but the model is class-conditional"),
        (("--labels", "/nowhere"), "--labels: .*nowhere"),
        (("--labels", "/nowhere", "--class", "1"), "exclude each other"),
        (("--batch", "some"), "--batch must be a number or auto"),
        (("--device", "tpu0"), "--device must be"),
        (("--device", "mps"), "--device must be one that is there; got 'mps'"),
        (("--device", "meta"), "--device must be"),
        (("--device", "cuda:99"), "--device must be"),
        (("--steps", "0"), "--steps must be"),
        (("--chunk-size", "0"), "--chunk-size must be"),
        (("--batch", "0"), "--batch must be"),
        (("--eta", "nan"), "--eta must be a finite number"),
        (("--seeds", "5,5"), "--seeds names 5 twice"),
        (("--overwrite", "--shard", "0/2"), "--overwrite cannot be combined with shard 0/2"),
        (("--shard", "2/2"), "shards count from 0"),
        (("--workers", "2"), "--workers is 2, but applies to ray only; pass --ray as well"),
        (("--class", "9" * 20), "holds 99999999999999999999"),
        (("--steps", "2000"), "--steps must be 1 to 1000, got 2000"),
        (("--grid", "/nowhere/a.png"), "--grid is .*no folder /nowhere"),
        (("--seeds", f"0-{2**63 - 1}"), "at most"),
        (("--grid", "a.png", "--no-grid"), "exclude each other"),
        (("--format", "npz", "--subdirs"), "subdirs"),
    ],
)
def test_bad_arguments_end_with_exit_code_2_and_one_clear_line(tmp_path, model, arguments, message):
    result = run(generate_command, "MODEL", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert re.search(message, result.output)
    python = {field.name for field in dataclasses.fields(JobSettings) if "_" in field.name.strip("_")}
    assert not python.intersection(re.findall(r"\w+", result.output))
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_one_line(tmp_path, model):
    result = run(generate_command, str(tmp_path / "nowhere"), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "nowhere" in result.output


def test_a_job_that_stops_exits_1_and_says_what_is_safe(tmp_path, model):
    model.bad = {20}
    result = run(generate_command, "MODEL", "--class", 1, "--batch", 8, "--chunk-size", 8, "--out", tmp_path)
    assert result.exit_code == 1
    assert "pass --on-bad skip" in result.output
    assert "16 of 64 images are done and safe" in result.output


def test_verify_exits_1_for_a_damaged_job_and_2_without_one(tmp_path):
    assert run(verify_command, tmp_path).exit_code == 2
    make(tmp_path, "0-9")
    (tmp_path / "000003.png").write_bytes(b"")
    result = run(verify_command, tmp_path, "--repair")
    assert result.exit_code == 1
    assert "chunk 0 (seeds 0 to 9) is damaged" in result.output
    assert "dropped 1 damaged chunks; run the same `ddim-fast generate` command again" in result.output
    make(tmp_path, "0-9")
    (tmp_path / "metadata.jsonl").unlink()
    assert "dropped metadata.jsonl; run the same" in run(verify_command, tmp_path, "--repair").output


def test_help_teaches_with_examples():
    for words in (
        "ddim-fast generate ddim-fast/digits",
        "torchrun",
        "srun",
        "--ray auto",
        "goes on when the same command",
    ):
        assert words in run(generate_command, "--help").output


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_keeps_what_is_finished_and_says_how_to_go_on(tmp_path, model, number, code, word):
    arguments = ["MODEL", "--class", "1", "--batch", "8", "--chunk-size", "16", "--out", str(tmp_path / "cut")]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(120)
            sys.stderr = os.fdopen(writing, "w", buffering=1)
            sample = model.sample_uint8

            def sample_and_wait(**asked):
                # The fifth batch opens the third chunk, and takes until the signal comes.
                if len(model.calls) == 4:
                    os.write(writing, b"ready\n")
                    # In naps: a signal that comes just before one long sleep would be seen after it.
                    for _ in range(600):
                        time.sleep(0.1)
                return sample(**asked)

            model.sample_uint8 = sample_and_wait
            generate_command.main(arguments)
        except SystemExit as done:
            os._exit(done.code)
        finally:
            os._exit(99)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as said:
        assert any("ready" in line for line in said), "the job ended before the signal"
        os.kill(child, number)
        rest = said.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert f"{word}; run the same command again to go on" in rest
    left = tree(tmp_path / "cut")
    assert {name for name in left if name.endswith(".png")} == {f"{seed:06d}.png" for seed in range(32)}
    assert not [name for name in left if "tmp/" in name or name.endswith(".lock")]
    model.calls.clear()
    assert run(generate_command, *arguments).exit_code == 0
    assert len(model.calls) == 4


def test_other_settings_are_told_in_the_words_of_who_asks(tmp_path, model):
    arguments = ("MODEL", "--class", 1, "--batch", 8, "--out", tmp_path)
    run(generate_command, *arguments)
    told = run(generate_command, *arguments, "--steps", 20, "--eta", 1).output
    assert "other settings: --steps is 50, now 20; --eta is 0.0, now 1.0." in told
    assert "start again with --overwrite" in told
    with pytest.raises(ValueError, match=r"num_inference_steps is 50, now 20\..*`overwrite`"):
        generate(model, "0-63", tmp_path, class_labels=1, batch_size=8, num_inference_steps=20, shard="0/1")


def test_the_remedy_for_a_missing_image_is_a_command_or_a_call(tmp_path, model):
    arguments = ("MODEL", "--class", 1, "--seeds", "0-9", "--out", tmp_path / "my run")
    run(generate_command, *arguments)
    (tmp_path / "my run/000004.png").unlink()
    (tmp_path / "my run/grid.png").unlink()
    told = run(generate_command, *arguments)
    assert told.exit_code == 1
    assert f"run `ddim-fast verify --repair '{tmp_path}/my run'`" in told.output
    with pytest.raises(JobError, match=r"call verify\('.*my run', repair=True\)"):
        generate(model, "0-9", tmp_path / "my run", class_labels=1, shard="0/1")


@pytest.mark.parametrize("out", ["", "  "])
def test_an_empty_name_for_the_folder_is_refused_and_nothing_written(tmp_path, model, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    result = run(generate_command, "MODEL", "--class", 1, "--out", out)
    assert result.exit_code == 2
    assert f"--out is {out!r}; name the job's folder" in result.output
    assert not os.listdir(tmp_path)


def test_an_error_of_a_library_is_one_line_and_no_traceback(tmp_path, model):
    def fail(**_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    model.sample_uint8 = fail
    result = run(generate_command, "MODEL", "--class", 1, "--out", tmp_path)
    assert result.exit_code == 1
    said = [line for line in result.output.splitlines() if line and "img/s" not in line]
    assert len(said) == 1
    assert "RuntimeError: Failed to find C compiler. Please specify one.; what is finished is safe" in said[0]
