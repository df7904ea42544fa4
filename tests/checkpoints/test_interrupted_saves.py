"""A save that is cut off, or that others look at or write over, leaves one whole checkpoint at every instant."""

import errno
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
from parts import load_parts

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim_fast.checkpoints import atomic, save, save_pipeline, save_unet
from ddim_fast.file_lock import locked

# Whole, in shards of two sizes, and pickled: what another layout left must not be taken for a part of this one.
LAYOUTS = ({}, {"max_shard_size": "30KB"}, {"max_shard_size": "9KB"}, {"safe_serialization": False})


@pytest.fixture
def other(tiny_config):
    torch.manual_seed(9)
    return UNet2DModel(**tiny_config).eval()


@pytest.fixture
def folder(unet, tmp_path):
    """A pipeline of `unet` in a few shards, and a file of the user's."""
    save_pipeline(unet, DDIMScheduler(beta_end=0.02), tmp_path / "pipe", max_shard_size="120KB")
    (tmp_path / "pipe" / "notes.txt").write_text("mine")
    return tmp_path / "pipe"


def overwrite(other, folder):
    save_pipeline(other, DDIMScheduler(beta_end=0.01), folder, max_shard_size="90KB")


def tree(folder):
    """Every file and folder with its content and its times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (state.st_ino, state.st_mtime_ns, state.st_ctime_ns, content)
    return found


def hidden(folder):
    return [str(path) for path in folder.rglob(".*")]


def is_whole(folder, expected, beta_end, same_weights):
    loaded, scheduler = load_parts(folder)
    same_weights(loaded, expected)
    assert scheduler.config.beta_end == beta_end
    assert (folder / "notes.txt").read_text() == "mine"


def in_child(work):
    """Start `work` in a process of its own; returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)
            work()
        finally:
            os._exit(0)
    return pid


def wait_for(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


CHANGES = ("replace", "rename", "unlink", "rmdir", "mkdir", "link")


def killed_before_change(number, work):
    """Run `work` in a process that dies before its change number `number` to the disk; whether it lived."""

    def doomed():
        left = number

        def counted(function):
            def call(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return function(*args, **kwargs)

            return call

        os.fsync = lambda descriptor: None
        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        work()

    return wait_for(in_child(doomed)) == 0


def test_killed_at_any_point_one_whole_checkpoint_is_there(unet, other, folder, same_weights, tmp_path):
    outcomes = []
    for number in range(100):
        target = tmp_path / str(number)
        shutil.copytree(folder, target)
        if killed_before_change(number, lambda target=target: overwrite(other, target)):
            break
        before = tree(target)
        # A reader of the network alone must not see half of a commit to the pipeline's folder, either.
        first = UNet2DModel.from_pretrained(target / "unet" if number % 2 else target)
        is_new = torch.equal(first.conv_in.weight, other.conv_in.weight)
        outcomes.append(is_new)
        is_whole(target, other if is_new else unet, 0.01 if is_new else 0.02, same_weights)
        assert tree(target) == before, "reading changed the folder"
        if number % 8 == 0:
            # Another layout comes next, and finds or leaves nothing of this one.
            save_pipeline(unet, DDIMScheduler(beta_end=0.03), target, **LAYOUTS[number // 8 % 4])
            is_whole(target, unet, 0.03, same_weights)
            assert not hidden(target)
    assert outcomes == sorted(outcomes) and outcomes.count(False) > 3 and outcomes.count(True) > 10
    is_whole(target, other, 0.01, same_weights)
    assert not hidden(target)


def test_killed_while_the_folder_is_new_there_is_none_or_a_whole_one(other, tmp_path, same_weights):
    for number in range(20):
        target = tmp_path / str(number) / "new"
        target.parent.mkdir()
        if killed_before_change(number, lambda target=target: overwrite(other, target)):
            break
        if target.exists():
            same_weights(load_parts(target)[0], other)
        overwrite(other, target)
        assert os.listdir(target.parent) == ["new"] and not hidden(target)
    assert number > 3


def test_a_network_saved_into_its_pipeline_wins_over_a_save_that_was_cut_off(unet, other, folder, same_weights):
    """The pipeline's save died after its commit; then its part is saved on its own."""
    number = 0
    while not (folder / atomic.COMMITTED).exists():
        assert not killed_before_change(number, lambda: overwrite(other, folder))
        number += 1
    save_unet(unet, folder / "unet")
    is_whole(folder, unet, 0.01, same_weights)
    assert not hidden(folder)


def test_thirty_kills_at_random_moments_lose_nothing_while_others_read(unet, other, folder, same_weights):
    """Each save dies at some moment of its own; two readers look all the while."""
    states = [network.state_dict() for network in (unet, other)]
    stopped, problems, loads = threading.Event(), [], [0]

    def read():
        while not stopped.is_set():
            try:
                loaded = load_parts(folder)[0].state_dict()
            except Exception as error:
                problems.append(repr(error))
                continue
            loads[0] += 1
            if not any(all(torch.equal(loaded[name], state[name]) for name in state) for state in states):
                problems.append("a mixture was loaded")

    def save_forever():
        for turn in range(1000):
            save_pipeline((unet, other)[turn % 2], DDIMScheduler(), folder, **LAYOUTS[turn % 4])

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    chance = random.Random(0)
    for _ in range(30):
        pid = in_child(save_forever)
        time.sleep(chance.uniform(0.02, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert wait_for(pid) == -signal.SIGKILL
    stopped.set()
    for reader in readers:
        reader.join()
    assert not problems, problems[0]
    assert loads[0] > 10
    save_pipeline(unet, DDIMScheduler(), folder)
    same_weights(UNet2DModel.from_pretrained(folder), unet)
    assert not hidden(folder)


def test_two_saves_at_one_instant_leave_one_whole_result(unet, other, folder, tmp_path, same_weights):
    for target in (folder, tmp_path / "new"):
        for turn in range(6):
            start = time.monotonic() + 0.1

            def save_at(network, layout, target=target, start=start):
                time.sleep(max(0.0, start - time.monotonic()))
                save_pipeline(network, DDIMScheduler(), target, **layout)

            children = [
                in_child(lambda turn=turn: save_at(unet, LAYOUTS[turn % 4])),
                in_child(lambda turn=turn: save_at(other, LAYOUTS[(turn + 1) % 4])),
            ]
            assert [wait_for(pid) for pid in children] == [0, 0]
            loaded = load_parts(target)[0]
            same_weights(loaded, unet if torch.equal(loaded.conv_in.weight, unet.conv_in.weight) else other)
            assert not hidden(target)


def test_a_process_that_was_forked_during_a_save_holds_nobody_up(other, folder):
    """The workers of a data loader, say, which live on."""
    with locked(folder / atomic._LOCK, wait=True):
        worker = in_child(lambda: time.sleep(30))
    overwrite(other, folder)
    os.kill(worker, signal.SIGKILL)
    wait_for(worker)


def test_a_save_waits_for_one_that_is_under_way_whoever_holds_it(unet, other, folder, same_weights):
    """Neither a process number nor a host's name tells whether the other one lives: a lock does."""
    with locked(folder / atomic._LOCK, wait=True):
        (folder / atomic._WRITING).mkdir()
        (folder / atomic._WRITING / "half").write_text("of a file")
        second = in_child(lambda: overwrite(other, folder))
        time.sleep(0.5)
        assert os.waitpid(second, os.WNOHANG) == (0, 0)
        assert (folder / atomic._WRITING / "half").read_text() == "of a file"
        is_whole(folder, unet, 0.02, same_weights)
    assert wait_for(second) == 0
    is_whole(folder, other, 0.01, same_weights)


@pytest.mark.parametrize("gone", ["unet/config.json", "model_index.json", "unet"])
def test_a_save_of_which_a_file_is_gone_fails_and_changes_nothing(
    unet, other, folder, same_weights, monkeypatch, gone
):
    write = save._write_scheduler

    def robbed(scheduler, place):
        name = write(scheduler, place)
        victim = place.parent / gone
        if victim.is_dir():
            shutil.rmtree(victim)
        elif victim.exists():
            victim.unlink()
        return name

    monkeypatch.setattr(save, "_write_scheduler", robbed)
    if gone == "model_index.json":
        monkeypatch.setattr(save, "_write_json", lambda path, entries: None)
    with pytest.raises(OSError, match="cannot save into"):
        overwrite(other, folder)
    is_whole(folder, unet, 0.02, same_weights)
    assert not hidden(folder)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_failing_write_changes_nothing(unet, other, folder, monkeypatch, shard):
    before = tree(folder)
    write, written = save._write_tensors, []

    def failing(tensors, path):
        if len(written) == shard:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(tensors, path)

    monkeypatch.setattr(save, "_write_tensors", failing)
    with pytest.raises(OSError, match=r"cannot save into .*pipe: No space left") as raised:
        overwrite(other, folder)
    assert raised.value.errno == errno.ENOSPC
    assert {name: entry[3] for name, entry in tree(folder).items()} == {n: entry[3] for n, entry in before.items()}
    assert os.listdir(folder.parent) == ["pipe"]


def test_a_failing_first_save_leaves_no_folder(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_write_tensors", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_unet(unet, tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_file_systems_without_hard_links_are_saved_to_as_well(other, folder, same_weights, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    overwrite(other, folder)
    is_whole(folder, other, 0.01, same_weights)
    assert not hidden(folder)


def test_file_systems_without_locks_are_saved_to_one_at_a_time(other, folder, same_weights, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    overwrite(other, folder)
    is_whole(folder, other, 0.01, same_weights)
    (folder / atomic._WRITING).mkdir()
    with pytest.raises(OSError, match=rf"another save is under way there, or one was cut off .*{atomic._WRITING}"):
        overwrite(other, folder)
    assert (folder / atomic._WRITING).is_dir()


def test_a_part_that_links_elsewhere_is_not_written_through(other, folder, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_text("mine")
    shutil.rmtree(folder / "unet")
    (folder / "unet").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match="unet is a link that leaves it"):
        overwrite(other, folder)
    assert os.listdir(tmp_path / "private") == ["config.json"]
    assert (tmp_path / "private" / "config.json").read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_is_named(other, folder):
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").mkdir()
    with pytest.raises(FileExistsError, match=r"model_index.json cannot be replaced by a file"):
        overwrite(other, folder)
    assert (folder / "model_index.json").is_dir() and not hidden(folder)


def test_what_a_download_brings_along_as_a_committed_save_is_only_read(unet, other, folder, same_weights, tmp_path):
    """Other names, links and climbing paths in such a folder are neither followed nor moved, by loads or by saves."""
    (tmp_path / "thesis.txt").write_text("three years")
    (folder / "notes.txt").write_text("mine")
    committed = folder / atomic.COMMITTED
    (committed / "unet").mkdir(parents=True)
    (committed / "notes.txt").write_text("theirs")
    (committed / "manifest.json").write_text(
        '{"files": ["../../thesis.txt"], "remove": ["../thesis.txt", "notes.txt"]}'
    )
    (committed / "unet" / "config.json").symlink_to(tmp_path / "thesis.txt")
    before = tree(tmp_path)
    for load in (DDIMPipeline.from_pretrained, UNet2DModel.from_pretrained):
        with pytest.raises(ValueError, match=r"config.json is a link that leaves its folder"):
            load(folder)
    DDIMScheduler.from_pretrained(folder)
    assert tree(tmp_path) == before
    overwrite(other, folder)
    is_whole(folder, other, 0.01, same_weights)
    assert (tmp_path / "thesis.txt").read_text() == "three years"


@pytest.mark.parametrize("content", [None, "", "{}", '{"files": 5}'])
def test_a_stray_file_under_a_committed_saves_name_disturbs_nobody(unet, folder, same_weights, content):
    for name in (atomic.COMMITTED, f"{atomic.COMMITTED}-x", atomic._WRITING, atomic._DONE):
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_text(content)
    is_whole(folder, unet, 0.02, same_weights)
    save_pipeline(unet, DDIMScheduler(), folder)
    assert os.listdir(folder).count(f"{atomic.COMMITTED}-x") == 1
