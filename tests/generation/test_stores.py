"""Jobs on fsspec paths."""

import fsspec
import pytest
from fake_jobs import FakePipeline, make

from ddim_fast.generation import JobError, verify
from ddim_fast.generation.store import open_store


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    for path in system.ls("/", detail=False):
        system.rm(path, recursive=True)


def test_overwrite_removes_what_a_job_wrote_and_nothing_else(memory):
    make("memory://job", "0-30", subdirs=True)
    memory.pipe("/job/notes.txt", b"mine")
    memory.pipe("/job/000000/mine.png", b"mine")
    make("memory://job", "40-42", overwrite=True)
    left = {path.removeprefix("/job/") for path in memory.find("/job") if "/." not in path}
    assert left == {"notes.txt", "000000/mine.png", "000040.png", "000041.png", "000042.png", "grid.png", "job.json",
                    "metadata.jsonl"}  # fmt: skip


def test_a_record_that_cannot_be_read_is_an_error_and_not_a_chunk_to_make_again(memory, monkeypatch):
    make("memory://job", "0-30")
    pipe = FakePipeline()

    def fail(path, **_):
        raise PermissionError(13, "Permission denied", path)

    read = type(memory).cat_file
    monkeypatch.setattr(
        type(memory),
        "cat_file",
        lambda self, path, **o: (fail if "/chunks/" in path else lambda p, **_: read(self, p))(path),
    )
    with pytest.raises(JobError, match="cannot write to memory://job"):
        make("memory://job", "0-30", pipe=pipe)
    assert not pipe.calls


def test_a_service_that_refuses_is_one_clear_error(memory, monkeypatch):
    class NoCredentials(Exception):
        pass

    def refuse(*_, **__):
        raise NoCredentials("no credentials found")

    monkeypatch.setattr(type(memory), "makedirs", refuse)
    with pytest.raises(ValueError, match="cannot write to memory://job: no credentials found"):
        make("memory://job")


def test_damaged_files_of_the_whole_job_are_made_again(memory):
    make("memory://job", "0-30")
    whole = memory.cat("/job/metadata.jsonl")
    memory.pipe("/job/metadata.jsonl", whole[:-3])
    assert verify("memory://job", repair=True).files == ["metadata.jsonl"]
    assert make("memory://job", "0-30").made == 0
    assert memory.cat("/job/metadata.jsonl") == whole


def test_a_file_address_is_a_local_folder_on_any_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    assert make(f"file://{folder}/out", "0-9").complete
    assert open_store(f"file://{folder}/out").out == str(folder / "out")
