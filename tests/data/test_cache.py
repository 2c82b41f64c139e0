"""Decoded images are cached once for all processes, within a limit, and decoded again when a file changes."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fakes
import numpy as np
import pytest
from fresh_commands import child_environment
from PIL import Image

from segdeconv.checkpoints import checkpoint
from segdeconv.cli.overrides import compose
from segdeconv.data import CamVid, Folder
from segdeconv.data.cache import Cached, open_store, plan_cache
from segdeconv.data.inspection import cache_folder
from segdeconv.data.relabelled import Relabelled
from segdeconv.data.store import IN_MEMORY, Store
from segdeconv.errors import Interrupted, UsageError
from segdeconv.train import train
from segdeconv.training.config_check import check_config
from segdeconv.training.data_module import DataModule
from segdeconv.training.prepare import prepare
from segdeconv.training.stopping import Stopping

ROOT = Path(__file__).parents[2]
ONE, OTHER = b"1" * 16, b"2" * 16

pytestmark = pytest.mark.skipif(not IN_MEMORY, reason="anonymous shared memory needs Linux")


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return Store(4, 4096, None if request.param == "memory" else tmp_path / "x.images")


def content(length, seed=0):
    return np.random.default_rng(seed).bytes(length)


def size_of(store):
    """Return the size of a store in bytes."""
    return os.fstat(store._file).st_size


def record_decoding(dataset, monkeypatch):
    """Return a list to which the index of every decoded image is appended."""
    read, decoded = type(dataset).__getitem__, []
    monkeypatch.setattr(type(dataset), "__getitem__", lambda self, index: (decoded.append(index), read(self, index))[1])
    return decoded


# The store


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize(
    "in_memory", [False, pytest.param(True, marks=pytest.mark.skipif(not IN_MEMORY, reason="Linux"))]
)
def test_threads_of_one_process_do_not_overwrite_each_others_entries(in_memory, tmp_path):
    content = [number.to_bytes(2, "little") * (1 + number % 40) for number in range(1000)]
    shared = Store(len(content), 1 << 20, None if in_memory else tmp_path / "x.images")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: shared.put(number, ONE, content[number]), range(len(content))))
    finally:
        sys.setswitchinterval(interval)
    assert [shared.get(number, ONE) for number in range(len(content))] == content
    child = os.fork()  # inherits a lock that is released
    if child == 0:
        shared.put(0, ONE, b"x")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert shared.get(0, ONE) == b"x"


def test_an_entry_is_returned_only_under_the_same_stamp(store):
    assert store.get(2, ONE) is None
    store.put(2, ONE, content(1000))
    store.put(0, ONE, content(10, 1))
    assert store.get(2, ONE) == content(1000)
    assert store.get(0, ONE) == content(10, 1)
    assert store.get(2, OTHER) is None
    assert store.get(1, ONE) is None


def test_the_limit_holds_and_the_first_entries_stay(store):
    for number in range(4):
        store.put(number, ONE, content(1500, number))
    stored = [store.get(number, ONE) == content(1500, number) for number in range(4)]
    assert stored == [True, True, False, False]
    assert size_of(store) <= 4096
    store.put(0, OTHER, content(1400, 9))  # replaces its predecessor
    assert store.get(0, OTHER) == content(1400, 9)
    assert size_of(store) <= 4096


def test_a_limit_below_the_header_stores_nothing(tmp_path):
    small = Store(4, 10, tmp_path / "x.images")
    small.put(0, ONE, content(1))
    assert small.get(0, ONE) is None


def test_every_damaged_byte_and_every_truncation_is_detected(tmp_path):
    path = tmp_path / "x.images"
    first = Store(1, 4096, path)
    first.put(0, ONE, content(100))
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        again = Store(1, 4096, path)
        assert again.get(0, ONE) in (None, content(100))
        again.put(0, ONE, content(100))
        assert again.get(0, ONE) in (None, content(100))
        assert size_of(again) <= 4096
        path.write_bytes(whole[:position])
        assert Store(1, 4096, path).get(0, ONE) is None


def test_a_lower_limit_truncates_the_store_of_an_earlier_run(tmp_path):
    first = Store(2, 4096, tmp_path / "x.images")
    first.put(0, ONE, content(1000))
    first.put(1, ONE, content(1000, 1))
    again = Store(2, 1500, tmp_path / "x.images")
    assert (again.get(0, ONE), again.get(1, ONE)) == (content(1000), None)
    again.put(1, ONE, content(1000, 1))
    assert (again.get(1, ONE), size_of(again)) == (None, 1500)


def test_a_full_disk_is_reported_once_and_stores_nothing(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    store = Store(2, 4096, tmp_path / "x.images")
    monkeypatch.setattr(Store, "_write", full)
    store.put(0, ONE, content(10))
    store.put(1, ONE, content(10))
    assert store.get(0, ONE) is None
    assert capsys.readouterr().out.count("no disk space is left for the cache") == 1


def fill(store, numbers):
    for number in numbers:
        store.put(number, ONE, content(2000, number))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_share_a_store(tmp_path, method):
    context = multiprocessing.get_context(method)
    for path in (None, tmp_path / "x.images"):
        store = Store(60, 1 << 20, path)
        others = [context.Process(target=fill, args=(store, range(first, 60, 2))) for first in (0, 1)]
        for other in others:
            other.start()
        for other in others:
            other.join()
        assert [store.get(number, ONE) == content(2000, number) for number in range(60)] == [True] * 60


@pytest.mark.parametrize("path", [None, "x.images"])
def test_a_process_killed_while_writing_leaves_no_lock_and_no_incomplete_entry(tmp_path, path):
    store = Store(2000, 8 << 20, path and tmp_path / path)
    for wait in (0.005, 0.01, 0.02, 0.03):
        other = multiprocessing.get_context("fork").Process(target=fill, args=(store, range(2000)))
        other.start()
        time.sleep(wait)
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert all(store.get(number, ONE) in (None, content(2000, number)) for number in range(2000))
    store.put(1999, ONE, content(2000, 1999))
    assert store.get(1999, ONE) == content(2000, 1999)


def test_anonymous_memory_leaves_no_file_behind():
    before = set(os.listdir("/dev/shm"))
    store = Store(2, 1 << 20)
    store.put(0, ONE, content(100000))
    assert set(os.listdir("/dev/shm")) == before


def test_memory_pickled_outside_of_spawning_is_empty(tmp_path):
    for path, expected in ((None, None), (tmp_path / "x.images", b"x")):
        store = Store(2, 4096, path)
        store.put(0, ONE, b"x")
        assert pickle.loads(pickle.dumps(store)).get(0, ONE) == expected


# The cached data set


def opened(dataset, kind="memory", gibibytes=None, size=None, **settings):
    plan = plan_cache(kind, gibibytes, [dataset], [size])
    return Cached(dataset, open_store(plan, [dataset], [size]), size=size, **settings)


def same(first, second):
    return first[2] == second[2] and all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(first[:2], second[:2], strict=True)
    )


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_an_image_is_decoded_once_and_returned_bit_by_bit(tmp_path, monkeypatch, kind):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    view = opened(plain, kind)
    expected = [plain[index] for index in range(4)]
    decoded = record_decoding(plain, monkeypatch)
    for _ in range(3):
        assert all(same(view[index], expected[index]) for index in range(4))
    assert decoded == [0, 1, 2, 3]
    decoded.clear()
    view = opened(plain, kind)  # as in the next run
    assert same(view[1], expected[1])
    assert decoded == ([0] if kind == "disk" else [0, 1])  # the size of the first image is needed for the plan


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_16_bit_images_of_any_channels_are_returned_bit_by_bit(tmp_path, channels):
    for index in range(4):
        random = np.random.default_rng(index)
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        image = random.integers(0, 65536, (9, 13 + index, channels)).astype(np.uint16)
        fakes.stored(tmp_path / "images" / f"{index}.npy", image)
        Image.fromarray(random.integers(0, 2, (9, 13 + index)).astype(np.uint8)).save(
            tmp_path / "masks" / f"{index}.png"
        )
    plain = Folder("train", str(tmp_path), channels=channels)
    view = opened(plain)
    for _ in range(2):
        for index in range(len(plain)):
            assert same(view[index], plain[index])


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("part", ["image", "mask"])
def test_a_changed_file_is_decoded_again_in_the_same_run_and_in_the_next(tmp_path, kind, part):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    view = opened(plain, kind)
    before = view[1]
    path = getattr(plain.pairs[1], part)
    changed = np.asarray(Image.open(path))[::-1]
    Image.fromarray(changed).save(path)
    os.utime(path, ns=(1, 1))
    for current in (view, view, opened(plain, kind)):
        assert same(current[1], plain[1])
        assert not same(current[1], before)
        assert same(current[0], plain[0])


def test_another_label_map_or_size_uses_another_file_on_disk(tmp_path):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    mapped = Relabelled(plain, {"sky": "ignore", "road": "drivable", "pavement": "drivable"})
    for dataset, size in ((plain, None), (mapped, None), (plain, (24, 32)), (plain, None)):
        view = opened(dataset, "disk", size=size)
        for _ in range(2):
            image, mask, _ = view[0]
            assert image.shape[:2] == mask.shape == (size or (48, 64))
            if size is None:
                assert same(view[0], dataset[0])
    assert len(list(cache_folder("decoded").glob("*.images"))) >= 3


def test_val_masks_keep_their_stored_size(tmp_path):
    plain = CamVid("val", str(fakes.camvid(tmp_path)))
    view = opened(plain, size=(24, 32), resize_masks=False)
    for _ in range(2):
        image, mask, _ = view[2]
        assert (image.shape, mask.shape) == ((24, 32, 3), (48, 64))
        np.testing.assert_array_equal(mask, plain[2].mask)


def test_images_that_do_not_fit_are_decoded_every_time(tmp_path, monkeypatch):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    view = opened(plain, gibibytes=30000 / 2**30)  # an image and its mask have 12288 bytes
    expected = [plain[index] for index in range(4)]
    decoded = record_decoding(plain, monkeypatch)
    for _ in range(3):
        assert all(same(view[index], expected[index]) for index in range(4))
    assert decoded == [0, 1, 2, 3, 2, 3, 2, 3]
    assert size_of(view.store) <= 30000


def test_the_least_recently_used_files_are_removed_from_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sets = [CamVid("train", str(fakes.camvid(tmp_path / name))) for name in "abc"]
    for dataset in sets:
        view = opened(dataset, "disk", gibibytes=110000 / 2**30)  # of 3 x 49 kB
        for index in range(4):
            view[index]
    files = list(cache_folder("decoded").glob("*.images"))
    assert sum(file.stat().st_size for file in files) <= 110000
    view, expected = opened(sets[2], "disk", gibibytes=110000 / 2**30), sets[2][3]
    decoded = record_decoding(sets[0], monkeypatch)
    assert same(view[3], expected)
    assert decoded == []


def test_a_missing_file_gives_the_same_error_as_without_a_cache(tmp_path):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    view = opened(plain)
    view[1]
    plain.pairs[1].image.unlink()
    with pytest.raises(UsageError, match="is missing - restore the file"):
        view[1]


def test_auto_caches_files_in_memory_and_never_on_disk(tmp_path):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    plan = plan_cache("auto", None, [plain], [None])
    assert (plan.kind, plan.needed) == ("memory", 4 * (24 + 48 * 64 * 4))
    assert 0 < plan.capacity < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 + 1
    assert plan_cache("auto", None, [fakes.Uneven("train")], [None]).kind == "none"


def test_processes_of_a_launcher_share_the_limit(tmp_path, monkeypatch):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    monkeypatch.setattr("segdeconv.data.cache.available", lambda device: 8 << 30)
    assert plan_cache("memory", None, [plain], [None]).capacity == 2 << 30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert plan_cache("memory", None, [plain], [None]).capacity == 1 << 29


def test_a_system_without_shared_memory_is_reported(tmp_path, monkeypatch):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    monkeypatch.setattr("segdeconv.data.cache.IN_MEMORY", False)
    assert plan_cache("auto", None, [plain], [None]).kind == "none"
    with pytest.raises(
        UsageError, match=r"dataset\.cache=memory is not possible on .* - use dataset\.cache=disk or none"
    ):
        plan_cache("memory", None, [plain], [None])


# Runs


def run(folder, root, *arguments, resume=None):
    config, _ = compose(
        [
            "dataset=camvid", f"dataset.root={root}", "augment=street", "model.stages=[[4],[8]]",
            "dataset.size=[32,48]", "dataset.batch_size=2", "trainer.max_epochs=3",
            "trainer.precision=32-true", "logger=none", *arguments,
        ],
        ROOT / "configs",
    )  # fmt: skip
    train({**config, "resume": resume}, folder)
    return digest(folder)


def digest(folder):
    result = hashlib.sha256((folder / "metrics.csv").read_bytes())
    for name, value in sorted(checkpoint.load_plain(folder / "last.ckpt")["state_dict"].items()):
        result.update(name.encode() + value.contiguous().numpy().tobytes())
    return result.hexdigest()


@pytest.mark.slow
def test_the_bits_of_a_run_do_not_depend_on_cache_workers_or_resuming(tmp_path, monkeypatch, capsys):
    root = fakes.camvid(tmp_path / "data", num=6)
    plain = run(tmp_path / "plain", root, "dataset.cache=none", "dataset.num_workers=0")
    assert "images are decoded every time" in capsys.readouterr().out
    partly = "memory dataset.cache_size=0.00001"
    cases = [("memory", 0), ("memory", 1), ("memory", 2), ("disk", 2), ("disk", 0), (partly, 2), ("none", 2)]
    for turn, (kind, workers) in enumerate(cases):
        settings = f"dataset.cache={kind} dataset.num_workers={workers}".split()
        assert run(tmp_path / f"{turn}", root, *settings) == plain
    output = capsys.readouterr().out
    assert "decoded images are kept in memory, about 0 MiB" in output
    assert "waiting for images" in output

    original = Stopping.on_train_batch_end

    def at_step(self, trainer, *others):
        if trainer.global_step == 4:
            self.received = signal.SIGTERM
        original(self, trainer, *others)

    for kind, next_kind in (("memory", "none"), ("none", "disk")):
        monkeypatch.setattr(Stopping, "on_train_batch_end", at_step)
        with pytest.raises(Interrupted):
            run(tmp_path / f"cut {kind}", root, f"dataset.cache={kind}", "dataset.num_workers=1")
        monkeypatch.setattr(Stopping, "on_train_batch_end", original)
        settings = (f"dataset.cache={next_kind}", "dataset.num_workers=0")
        assert run(tmp_path / f"cut {kind}", root, *settings, resume="auto") == plain


def test_a_resumed_run_does_not_decode_the_batches_it_skips(tmp_path, monkeypatch):
    from types import SimpleNamespace

    root = fakes.camvid(tmp_path / "data", num=8)
    arguments = [
        "dataset=camvid",
        f"dataset.root={root}",
        "dataset.batch_size=2",
        "dataset.size=[32,48]",
        "model.stages=[[4]]",
    ]
    config, _ = compose([*arguments, "dataset.num_workers=0"], ROOT / "configs")
    data = DataModule(prepare(check_config(config)).data)
    data.trainer = SimpleNamespace(
        global_step=3, accumulate_grad_batches=1, limit_train_batches=1.0, global_rank=0, world_size=1
    )
    decoded = record_decoding(data.pipeline.train, monkeypatch)
    assert len(list(data.train_dataloader())) == 1
    assert len(decoded) == 2


def test_crops_of_one_image_decode_it_once(tmp_path, monkeypatch):
    from segdeconv.data import VOC
    from segdeconv.data.crops import Crops

    crops = Crops(VOC("train", str(fakes.voc(tmp_path))), examples="objects")
    wrapped = crops.wrap(lambda whole: opened(whole))
    expected = [crops[index] for index in range(len(crops))]
    decoded = record_decoding(crops.dataset, monkeypatch)
    assert all(same(wrapped[index], expected[index]) for index in range(len(crops)))
    assert len(crops) > len(decoded) == 2


KILLED = """
import os, signal, sys, time
import fakes
from segdeconv.data import CamVid
from segdeconv.data.cache import Cached, open_store, plan_cache
plain = CamVid("train", sys.argv[1])
view = Cached(plain, open_store(plan_cache("memory", None, [plain], [None]), [plain], [None]))
view[0], view[1]
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_no_memory_behind(tmp_path):
    root = fakes.camvid(tmp_path)
    before = set(os.listdir("/dev/shm"))
    environment = child_environment(ROOT, ROOT / "tests")
    done = subprocess.run([sys.executable, "-c", KILLED, str(root)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert set(os.listdir("/dev/shm")) <= before
