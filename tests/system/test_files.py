"""Files that are whole or not there."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from segdeconv.errors import UsageError
from segdeconv.system.files import lock_folder, replace_link, replace_text, replacing, replacing_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    replace_text(path, "old")

    def fail(way, write):
        with way(path) as new:
            write(new)
            assert path.read_text() == "old"
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail(replacing_path, lambda new: new.write_bytes(b"new"))
    with pytest.raises(ArithmeticError):
        fail(replacing, lambda new: new.write(b"new"))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_folder_after(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor):
        order.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        sync(descriptor)

    def noted_replace(source, target, **named):
        order.append("rename")
        replace(source, target, **named)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    replace_text(tmp_path / "a", "text")
    written, *rest = order
    assert written.startswith(f"sync .tmp-{os.getpid()}-")
    assert rest == ["rename", f"sync {tmp_path.name}"]


def test_writers_of_the_same_file_in_two_threads_do_not_meet(tmp_path):
    path, both = tmp_path / "sub" / "a", threading.Barrier(2, timeout=60)

    def write(content):
        with replacing(path) as file:
            both.wait()  # each has its file open
            file.write(content)
            both.wait()

    threads = [threading.Thread(target=write, args=[content]) for content in (b"one", b"three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b"one", b"three")
    assert names(path.parent) == ["a"]


def test_a_second_name_for_the_same_file_leaves_nothing_behind(tmp_path):
    """The kernel renames nothing where both names are of one file."""
    (tmp_path / "last").write_text("x")
    for _ in range(2):
        replace_link(tmp_path / "previous", tmp_path / "last")
        assert names(tmp_path) == ["last", "previous"]


def test_a_name_as_long_as_a_name_may_be_is_written_too(tmp_path):
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
            os.kill(worker, 0)  # is still there
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch, answer):
    def refuse(descriptor, operation):
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert lock_folder(tmp_path / "new", "name") is None
    assert (tmp_path / "new").is_dir()
