"""Decoded images are kept once for all processes, within a bound, and never in place of what the files hold now."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
from PIL import Image

from segdeconv.checkpoints import checkpoint
from segdeconv.config import compose
from segdeconv.data import CamVid, Folder
from segdeconv.data.cache import Cached, make_room, open_store
from segdeconv.data.inspection import cache
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

pytestmark = pytest.mark.skipif(not IN_MEMORY, reason="memory without a name is Linux's")


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return Store(4, 4096, None if request.param == "memory" else tmp_path / "x.images")


def content(length, seed=0):
    return np.random.default_rng(seed).bytes(length)


def taken(store):
    """Bytes that a store takes now."""
    return os.fstat(store._file).st_size


def counted(dataset, monkeypatch):
    """The indices that are decoded from now on."""
    read, seen = type(dataset).__getitem__, []
    monkeypatch.setattr(type(dataset), "__getitem__", lambda self, index: (seen.append(index), read(self, index))[1])
    return seen


# The store.


def test_what_was_put_is_got_under_the_same_stamp_alone(store):
    assert store.get(2, ONE) is None
    store.put(2, ONE, content(1000))
    store.put(0, ONE, content(10, 1))
    assert store.get(2, ONE) == content(1000)
    assert store.get(0, ONE) == content(10, 1)
    assert store.get(2, OTHER) is None
    assert store.get(1, ONE) is None


def test_the_bound_holds_and_what_came_first_stays(store):
    for number in range(4):
        store.put(number, ONE, content(1500, number))
    kept = [store.get(number, ONE) == content(1500, number) for number in range(4)]
    assert kept == [True, True, False, False]
    assert taken(store) <= 4096
    store.put(0, OTHER, content(1400, 9))  # in the place of its predecessor
    assert store.get(0, OTHER) == content(1400, 9)
    assert taken(store) <= 4096


def test_a_bound_below_everything_keeps_nothing(tmp_path):
    small = Store(4, 10, tmp_path / "x.images")
    small.put(0, ONE, content(1))
    assert small.get(0, ONE) is None


def test_every_damaged_byte_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "x.images"
    first = Store(1, 4096, path)
    first.put(0, ONE, content(100))
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        again = Store(1, 4096, path)
        assert again.get(0, ONE) in (None, content(100))
        again.put(0, ONE, content(100))
        assert again.get(0, ONE) in (None, content(100))
        assert taken(again) <= 4096
        path.write_bytes(whole[:place])
        assert Store(1, 4096, path).get(0, ONE) is None


def test_a_lower_bound_cuts_what_an_earlier_run_kept(tmp_path):
    first = Store(2, 4096, tmp_path / "x.images")
    first.put(0, ONE, content(1000))
    first.put(1, ONE, content(1000, 1))
    again = Store(2, 1500, tmp_path / "x.images")
    assert (again.get(0, ONE), again.get(1, ONE)) == (content(1000), None)
    again.put(1, ONE, content(1000, 1))
    assert (again.get(1, ONE), taken(again)) == (None, 1500)


def test_a_full_disk_costs_the_speed_and_nothing_else(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    store = Store(2, 4096, tmp_path / "x.images")
    monkeypatch.setattr(Store, "_write", full)
    store.put(0, ONE, content(10))
    store.put(1, ONE, content(10))
    assert store.get(0, ONE) is None
    assert capsys.readouterr().out.count("no space is left for") == 1


def fill(store, numbers):
    for number in numbers:
        store.put(number, ONE, content(2000, number))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_share_it_and_take_turns(tmp_path, method):
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
def test_a_process_that_is_killed_while_it_writes_leaves_no_lock_and_no_half_entry(tmp_path, path):
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


def test_memory_has_no_name_that_could_be_left_behind():
    before = set(os.listdir("/dev/shm"))
    store = Store(2, 1 << 20)
    store.put(0, ONE, content(100000))
    assert set(os.listdir("/dev/shm")) == before


def test_memory_that_is_pickled_for_nobody_keeps_nothing(tmp_path):
    for path, found in ((None, None), (tmp_path / "x.images", b"x")):
        store = Store(2, 4096, path)
        store.put(0, ONE, b"x")
        assert pickle.loads(pickle.dumps(store)).get(0, ONE) == found


# The view of a data set.


def opened(dataset, kind="memory", gibibytes=None, size=None, **settings):
    room = make_room(kind, gibibytes, [dataset], [size])
    return Cached(dataset, open_store(room, [dataset], [size]), size=size, **settings)


def same(one, other):
    return one[2] == other[2] and all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one[:2], other[:2], strict=True)
    )


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_an_image_is_decoded_once_and_comes_back_to_the_bit(tmp_path, monkeypatch, kind):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    view = opened(plain, kind)
    expected = [plain[index] for index in range(4)]
    seen = counted(plain, monkeypatch)
    for _ in range(3):
        assert all(same(view[index], expected[index]) for index in range(4))
    assert seen == [0, 1, 2, 3]
    seen.clear()
    view = opened(plain, kind)  # of the next run
    assert same(view[1], expected[1])
    assert seen == ([0] if kind == "disk" else [0, 1])  # the first image says how large all are


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_16_bit_images_of_any_channels_come_back_to_the_bit(tmp_path, channels):
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
def test_a_file_that_changes_is_decoded_again_while_the_run_lasts_and_in_the_next(tmp_path, kind, part):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    view = opened(plain, kind)
    before = view[1]
    path = getattr(plain.pairs[1], part)
    changed = np.asarray(Image.open(path))[::-1]
    Image.fromarray(changed).save(path)
    os.utime(path, ns=(1, 1))
    for now in (view, view, opened(plain, kind)):
        assert same(now[1], plain[1])
        assert not same(now[1], before)
        assert same(now[0], plain[0])


def test_another_label_map_or_size_is_another_file_on_the_disk(tmp_path):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    mapped = Relabelled(plain, {"sky": "ignore", "road": "drivable", "pavement": "drivable"})
    for dataset, size in ((plain, None), (mapped, None), (plain, (24, 32)), (plain, None)):
        view = opened(dataset, "disk", size=size)
        for _ in range(2):
            image, mask, _ = view[0]
            assert image.shape[:2] == mask.shape == (size or (48, 64))
            if size is None:
                assert same(view[0], dataset[0])
    assert len(list(cache("decoded").glob("*.images"))) >= 3


def test_val_keeps_its_masks_as_they_are_stored(tmp_path):
    plain = CamVid("val", str(fakes.camvid(tmp_path)))
    view = opened(plain, size=(24, 32), masks_too=False)
    for _ in range(2):
        image, mask, _ = view[2]
        assert (image.shape, mask.shape) == ((24, 32, 3), (48, 64))
        np.testing.assert_array_equal(mask, plain[2].mask)


def test_what_does_not_fit_is_decoded_every_time(tmp_path, monkeypatch):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    view = opened(plain, gibibytes=30000 / 2**30)  # an image and its mask have 12288 bytes
    expected = [plain[index] for index in range(4)]
    seen = counted(plain, monkeypatch)
    for _ in range(3):
        assert all(same(view[index], expected[index]) for index in range(4))
    assert seen == [0, 1, 2, 3, 2, 3, 2, 3]
    assert taken(view.store) <= 30000


def test_the_files_used_longest_ago_make_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sets = [CamVid("train", str(fakes.camvid(tmp_path / name))) for name in "abc"]
    for dataset in sets:
        view = opened(dataset, "disk", gibibytes=110000 / 2**30)  # of 3 x 49 kB
        for index in range(4):
            view[index]
    files = list(cache("decoded").glob("*.images"))
    assert sum(file.stat().st_size for file in files) <= 110000
    view, expected = opened(sets[2], "disk", gibibytes=110000 / 2**30), sets[2][3]
    seen = counted(sets[0], monkeypatch)
    assert same(view[3], expected)
    assert seen == []


def test_a_missing_file_is_the_sentence_it_always_was(tmp_path):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    view = opened(plain)
    view[1]
    plain.pairs[1].image.unlink()
    with pytest.raises(UsageError, match="is missing - restore the file"):
        view[1]


def test_auto_keeps_files_in_memory_and_never_fills_the_disk(tmp_path):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    room = make_room("auto", None, [plain], [None])
    assert (room.kind, room.needed) == ("memory", 4 * (24 + 48 * 64 * 4))
    assert 0 < room.capacity < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 + 1
    assert make_room("auto", None, [fakes.Uneven("train")], [None]).kind == "none"


def test_processes_that_a_launcher_started_share_the_bound(tmp_path, monkeypatch):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    monkeypatch.setattr("segdeconv.data.cache.free_memory", lambda: 8 << 30)
    assert make_room("memory", None, [plain], [None]).capacity == 2 << 30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert make_room("memory", None, [plain], [None]).capacity == 1 << 29


def test_a_system_that_cannot_share_says_so(tmp_path, monkeypatch):
    plain = CamVid("train", str(fakes.camvid(tmp_path)))
    monkeypatch.setattr("segdeconv.data.cache.IN_MEMORY", False)
    assert make_room("auto", None, [plain], [None]).kind == "none"
    with pytest.raises(
        UsageError, match=r"dataset\.cache=memory is not possible on .* - use dataset\.cache=disk or none"
    ):
        make_room("memory", None, [plain], [None])


# A run.


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
    found = hashlib.sha256((folder / "metrics.csv").read_bytes())
    for name, value in sorted(checkpoint.load_plain(folder / "last.ckpt")["state_dict"].items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def test_the_bits_of_a_run_do_not_depend_on_cache_workers_or_resuming(tmp_path, monkeypatch, capsys):
    root = fakes.camvid(tmp_path / "data", num=6)
    plain = run(tmp_path / "plain", root, "dataset.cache=none", "dataset.num_workers=0")
    assert "images are decoded every time" in capsys.readouterr().out
    partly = "memory dataset.cache_size=0.00001"
    tried = [("memory", 0), ("memory", 1), ("memory", 2), ("disk", 2), ("disk", 0), (partly, 2), ("none", 2)]
    for turn, (kind, workers) in enumerate(tried):
        settings = f"dataset.cache={kind} dataset.num_workers={workers}".split()
        assert run(tmp_path / f"{turn}", root, *settings) == plain
    shown = capsys.readouterr().out
    assert "decoded images are kept in memory, about 0 MiB" in shown
    assert "waiting for images" in shown

    ask = Stopping.on_train_batch_end

    def at_step(self, trainer, *others):
        if trainer.global_step == 4:
            self.received = signal.SIGTERM
        ask(self, trainer, *others)

    for kind, next_kind in (("memory", "none"), ("none", "disk")):
        monkeypatch.setattr(Stopping, "on_train_batch_end", at_step)
        with pytest.raises(Interrupted):
            run(tmp_path / f"cut {kind}", root, f"dataset.cache={kind}", "dataset.num_workers=1")
        monkeypatch.setattr(Stopping, "on_train_batch_end", ask)
        settings = (f"dataset.cache={next_kind}", "dataset.num_workers=0")
        assert run(tmp_path / f"cut {kind}", root, *settings, resume="auto") == plain


def test_a_resumed_run_decodes_nothing_of_the_batches_it_skips(tmp_path, monkeypatch):
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
    data.trainer = SimpleNamespace(global_step=3, accumulate_grad_batches=1, global_rank=0, world_size=1)
    seen = counted(data.pipeline.train, monkeypatch)
    assert len(list(data.train_dataloader())) == 1
    assert len(seen) == 2


def test_crops_of_one_image_decode_it_once(tmp_path, monkeypatch):
    from segdeconv.data import VOC
    from segdeconv.data.crops import Crops

    crops = Crops(VOC("train", str(fakes.voc(tmp_path))), examples="objects")
    through = crops.through(lambda whole: opened(whole))
    expected = [crops[index] for index in range(len(crops))]
    seen = counted(crops.dataset, monkeypatch)
    assert all(same(through[index], expected[index]) for index in range(len(crops)))
    assert len(crops) > len(seen) == 2


KILLED = """
import os, signal, sys, time
import fakes
from segdeconv.data import CamVid
from segdeconv.data.cache import Cached, make_room, open_store
plain = CamVid("train", sys.argv[1])
view = Cached(plain, open_store(make_room("memory", None, [plain], [None]), [plain], [None]))
view[0], view[1]
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_behind_by_a_run_that_is_killed(tmp_path):
    root = fakes.camvid(tmp_path)
    before = set(os.listdir("/dev/shm"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(root)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert set(os.listdir("/dev/shm")) <= before
