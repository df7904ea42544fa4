"""Jobs on S3, over its protocol: a server on this machine's loopback."""

import logging
import os
import random
import signal
import threading

import pytest
from fake_jobs import FakePipeline, fork, killed, make, tree

from ddim_fast.generation import JobError, verify

moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'ddim_fast[s3]'")

FORMATS = ["png", "npz", "webdataset", "parquet"]
JOB = {"seeds": "0-10", "batch_size": 4, "chunk_size": 4}


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    yield system
    system.rm("bucket", recursive=True)


def objects(s3, folder):
    """Every object below `folder`: relative name to bytes."""
    s3.invalidate_cache()
    found = s3.cat(s3.find(folder))
    return {path.removeprefix(f"{folder}/"): data for path, data in found.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_objects_equal_files(s3, tmp_path, format):
    make(tmp_path, format=format, **JOB)
    report = make("s3://bucket/run", format=format, **JOB)
    assert (report.made, report.complete) == (11, True)
    assert objects(s3, "bucket/run") == tree(tmp_path)
    assert verify("s3://bucket/run").ok
    again = FakePipeline()
    assert make("s3://bucket/run", pipe=again, format=format, **JOB).made == 0
    assert not again.calls


def counting_requests(kill_at=None):
    """Count this process's requests; it is killed before or after number `kill_at`."""
    seen = []
    call = s3fs.S3FileSystem._call_s3

    async def counted(self, *how, **what):
        seen.append(how[0])
        number = len(seen)
        if kill_at is not None and number == abs(kill_at) and kill_at < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = await call(self, *how, **what)
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    s3fs.S3FileSystem._call_s3 = counted
    return seen


@pytest.mark.parametrize("format", ["png", pytest.param("npz", marks=pytest.mark.slow)])
def test_killed_at_random_requests_and_resumed_nothing_is_lost(s3, tmp_path, format, monkeypatch):
    make(tmp_path, format=format, **JOB)
    undisturbed = tree(tmp_path)
    with monkeypatch.context() as counted:
        counted.setattr(s3fs.S3FileSystem, "_call_s3", s3fs.S3FileSystem._call_s3)
        requests = len(counting_requests_of(lambda: make("s3://bucket/counted", format=format, **JOB)))
    chance = random.Random(3)
    kills = 0
    for number in range(6):
        out = f"s3://bucket/{number}"
        moment = chance.randint(1, requests - 1) * chance.choice([1, -1])

        def work(out=out, moment=moment):
            counting_requests(moment)
            make(out, format=format, **JOB)

        kills += killed(fork(work))
        make(out, format=format, **JOB)
        assert objects(s3, f"bucket/{number}") == undisturbed, f"killed at request {moment}"
    assert kills >= 5


def counting_requests_of(work):
    seen = counting_requests()
    work()
    return seen


@pytest.mark.parametrize("attempt", range(2))
def test_of_two_jobs_with_other_settings_at_one_moment_one_has_the_place(s3, attempt):
    planned = threading.Barrier(2)
    ended = []

    def start(eta):
        pipe = FakePipeline()
        check = pipe.scheduler.set_timesteps

        def wait(*how, **what):
            planned.wait(60)
            return check(*how, **what)

        object.__setattr__(pipe.scheduler, "set_timesteps", wait)
        try:
            ended.append(make("s3://bucket/run", pipe=pipe, eta=eta, grid=False, **JOB))
        except ValueError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=start, args=(eta,)) for eta in (0.0, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [end for end in ended if isinstance(end, str)]
    assert len(refused) == 1, ended
    assert "holds a job with other settings: eta is" in refused[0] or "which no job wrote" in refused[0]
    assert verify("s3://bucket/run").ok


def test_a_file_of_the_users_that_appears_under_a_coming_name_is_kept(s3):
    class Disturbed(FakePipeline):
        def sample_uint8(self, **arguments):
            s3.pipe_file("bucket/run/000009.png", b"mine")
            return super().sample_uint8(**arguments)

    with pytest.raises(JobError, match=r"run/000009\.png has the name of a file of this job.*so it is kept"):
        make("s3://bucket/run", pipe=Disturbed(), **JOB)
    assert s3.cat_file("bucket/run/000009.png") == b"mine"


def test_a_bucket_that_is_mistyped_is_refused_and_not_made(s3):
    with pytest.raises(ValueError, match="out is 's3://bukcet/run', but there is no bucket 'bukcet'; make it first"):
        make("s3://bukcet/run", **JOB)
    assert not s3.exists("bukcet")
    with pytest.raises(ValueError, match="names no place"):
        make("s3://", **JOB)


def test_settings_that_are_removed_in_mid_run_end_it_with_an_error_and_come_back(s3, tmp_path):
    class Disturbed(FakePipeline):
        def sample_uint8(self, **arguments):
            if len(self.calls) == 2:
                s3.rm("bucket/run/job.json")
            return super().sample_uint8(**arguments)

    with pytest.raises(JobError, match=r"job\.json was removed while the job ran"):
        make("s3://bucket/run", pipe=Disturbed(), **JOB)
    assert make("s3://bucket/run", **JOB).complete
    make(tmp_path, **JOB)
    assert objects(s3, "bucket/run") == tree(tmp_path)


def test_a_store_that_does_not_know_the_condition_says_so(s3, caplog, monkeypatch):
    put = s3fs.S3FileSystem._pipe_file

    async def put_always(self, path, data, **options):
        options.pop("mode", None)
        return await put(self, path, data, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", put_always)
    s3fs.S3FileSystem.clear_instance_cache()
    assert make("s3://bucket/unconditional", **JOB).complete
    assert "writes no object on the condition that it is new; start no second run" in caplog.text
