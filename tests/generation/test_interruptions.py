"""What a second interruption, a full memory and a signal leave behind."""

import shutil
import signal
import threading

import pytest
import torch
from fake_jobs import FakePipeline, make, tree

from ddim_fast.generation import verify
from ddim_fast.generation.sampling import is_out_of_memory
from ddim_fast.generation.store import LocalStore


def test_a_second_interruption_waits_for_the_chunk_that_is_being_written(tmp_path, monkeypatch):
    writing, go_on, written = threading.Event(), threading.Event(), threading.Event()
    publish = LocalStore.publish

    def slow_publish(self, *what):
        writing.set()
        assert go_on.wait(60)
        publish(self, *what)
        written.set()

    class Interrupted(FakePipeline):
        def sample_uint8(self, **arguments):
            if len(self.calls) == 2:
                assert writing.wait(60)
                again.start()
                raise KeyboardInterrupt
            return super().sample_uint8(**arguments)

    def interrupt_again():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        threading.Timer(0.3, go_on.set).start()

    monkeypatch.setattr(LocalStore, "publish", slow_publish)
    again = threading.Timer(0.3, interrupt_again)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, "0-99", pipe=Interrupted())
    assert written.is_set()
    left = tree(tmp_path)
    assert ".ddim-fast/chunks/000000.json" in left
    assert not [name for name in left if "/tmp/" in name or name.endswith(".lock")]
    monkeypatch.undo()
    assert make(tmp_path, "0-99").made == 84
    assert verify(tmp_path).ok


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_say_that_memory_is_full(error, full):
    assert is_out_of_memory(error) == full


def test_parts_that_do_not_divide_the_batch_are_counted_as_they_run(tmp_path, caplog):
    pipe = FakePipeline(most=2)
    make(tmp_path, "0-5", pipe=pipe, batch_size=6)
    assert [len(call) for call in pipe.calls] == [6, 3, 2, 2, 2]
    assert "batches run in 3 parts of up to 2 images" in caplog.text


def test_a_job_cut_off_around_its_contact_sheet_knows_it_as_its_own(tmp_path, monkeypatch):
    make(tmp_path / "whole", "0-9")
    write = LocalStore.write
    for number in range(1, 4):
        for after in (False, True):
            calls = iter(range(1, 100))

            def cut(self, *file, number=number, after=after, calls=calls):
                last = next(calls) == number
                if after or not last:
                    write(self, *file)
                if last:
                    raise KeyboardInterrupt

            monkeypatch.setattr(LocalStore, "write", cut)
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path / "cut", "0-9")
            monkeypatch.undo()
            make(tmp_path / "cut", "0-9")
            assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
            make(tmp_path / "cut", "20-99", overwrite=True)
            assert not (tmp_path / "cut/grid.png").exists()
            shutil.rmtree(tmp_path / "cut")
