"""Atomic writes, locks and hashes of files."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from segdeconv.errors import DiskError, UsageError
from segdeconv.system import files
from segdeconv.system.files import (
    lock_folder,
    remove_partial_files,
    replace_link,
    replace_text,
    replacing,
    replacing_path,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failing_writer_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "a"
    replace_text(path, "old")

    def fail(replace, write):
        with replace(path) as new:
            write(new)
            assert path.read_text() == "old"
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail(replacing_path, lambda new: new.write_bytes(b"new"))
    with pytest.raises(ArithmeticError):
        fail(replacing, lambda new: new.write(b"new"))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_the_file_is_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace

    def recorded_sync(descriptor):
        order.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        sync(descriptor)

    def recorded_replace(source, target, **arguments):
        order.append("rename")
        replace(source, target, **arguments)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    replace_text(tmp_path / "a", "text")
    written, *rest = order
    assert written.startswith(f"sync .tmp-{os.getpid()}-")
    assert rest == ["rename", f"sync {tmp_path.name}"]


def test_two_threads_can_write_the_same_file_at_once(tmp_path):
    path, barrier = tmp_path / "sub" / "a", threading.Barrier(2, timeout=60)

    def write(content):
        with replacing(path) as file:
            barrier.wait()  # barrier files are open
            file.write(content)
            barrier.wait()

    threads = [threading.Thread(target=write, args=[content]) for content in (b"one", b"three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b"one", b"three")
    assert names(path.parent) == ["a"]


def test_a_repeated_hard_link_leaves_no_temporary_file(tmp_path):
    """Renaming a hard link onto the same file does nothing."""
    (tmp_path / "last").write_text("x")
    for _ in range(2):
        replace_link(tmp_path / "previous", tmp_path / "last")
        assert names(tmp_path) == ["last", "previous"]


def test_a_file_name_of_the_maximum_length_can_be_written(tmp_path):
    path = tmp_path / ("ä" * 127)
    replace_text(path, "text")
    assert path.read_text() == "text"


HOLD = """
import os, sys, time
from pathlib import Path
from segdeconv.system.files import lock_folder
held = lock_folder(Path(sys.argv[1]), "name")
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_worker_that_outlives_a_killed_process_does_not_keep_its_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        try:
            with pytest.raises(UsageError, match=rf"is in use by process {holder.pid} on .* choose another name"):
                lock_folder(tmp_path, "name")
            holder.kill()
            holder.wait()
            lock = lock_folder(tmp_path, "name")
            assert lock is not None
            lock.release()
            os.kill(worker, 0)  # it is still alive
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_lock_folder_returns_none_on_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def refuse(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert lock_folder(tmp_path / "new", "name") is None
    assert (tmp_path / "new").is_dir()


def test_a_user_without_a_home_folder_has_a_cache_for_this_process(monkeypatch, capsys):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(files.Path, "home", home)
    folder = files.cache_root()
    assert folder.is_dir()
    assert files.cache_root() == folder
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("segdeconv: warning: HOME: not set, and the user has no account, so nothing is cached")
    files._temporary_cache().cleanup()
    files._temporary_cache.cache_clear()


@pytest.mark.parametrize(("name", "valid"), [("plain", True), ("café 李明 😀", True), ("caf\udce9", False)])
def test_a_text_with_a_file_name_is_written_as_utf8(name, valid, tmp_path):
    files.replace_text(tmp_path / "text", name)
    assert (tmp_path / "text").read_text(encoding="utf-8") == (name if valid else r"caf\udce9")
    assert files.is_utf8(name) == valid
    assert len(files.hash_text(name)) == 64


def test_files_with_one_ending_written_at_once_stay_apart(tmp_path):
    """Partial files are named after the end of a name, which many names share."""
    ends = [f"{number:03d}-{'x' * 60}.json" for number in range(60)]

    def write(numbers):
        for number in numbers:
            with replacing(tmp_path / ends[number]) as file:
                file.write(str(number).encode())

    threads = [threading.Thread(target=write, args=(range(start, 60, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ends
    assert [(tmp_path / name).read_text() for name in ends] == [str(number) for number in range(60)]


def test_only_partial_files_of_ended_processes_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    parent = os.getppid()
    kept = [".tmp-x", ".tmp-12-notes", f".tmp-{parent}-0123abcd-a.png", "a.tmp-1-0123abcd-a", "other/.tmp-1-x"]
    removed = [f".tmp-{ended.pid}-0123abcd-a.png", f".tmp-{os.getpid()}-0123abcd-a.png"]
    for name in (*kept, *removed, f"sub/{removed[0]}", f"other/{removed[0]}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / f".tmp-{ended.pid}-0123abcd-folder").mkdir()
    (tmp_path / ".tmp-dir").mkdir()
    remove_partial_files(tmp_path, belongs_elsewhere=lambda folder: folder.name == "other")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, f"other/{removed[0]}"}
    assert (tmp_path / ".tmp-dir").is_dir()


def test_a_lock_file_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with pytest.raises(
        UsageError, match=r"\.lock is not a lock file of segdeconv - remove it, or choose another --out"
    ):
        lock_folder(tmp_path, "--out")
    assert (tmp_path / ".lock").read_text() == "mine"


def test_a_folder_that_disappears_is_one_error(tmp_path):
    def write_and_remove():
        with replacing(tmp_path / "a" / "b") as file:
            file.write(b"x")
            shutil.rmtree(tmp_path / "a")

    with pytest.raises(DiskError, match="its folder was removed or cannot be created"):
        write_and_remove()


def test_a_link_to_a_file_whose_folder_was_removed_is_one_error(tmp_path):
    with pytest.raises(DiskError, match="its folder was removed or cannot be created"):
        replace_link(tmp_path / "run" / "kept-2.ckpt", tmp_path / "run" / "last.ckpt")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_folder_that_cannot_be_created_is_one_error():
    with pytest.raises(UsageError, match=r"/proc/x cannot be created: .* - choose another --out"):
        lock_folder(Path("/proc/x"), "--out")
