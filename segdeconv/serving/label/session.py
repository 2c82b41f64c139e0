"""A labelling session: photos, strokes and a network that learns from them, brought together.

Strokes are stored in any thread, at once. The network belongs to the thread that runs the server: learning, proposals,
and, while nobody waits, a sweep over all photos for previews and for their order in the strip.
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from segdeconv.analysis.ranking import Measured, rank, region_uncertainty
from segdeconv.data.files.reading import MAX_PIXELS, read_upright
from segdeconv.data.preprocessing import Size, resize_image
from segdeconv.drawing.thumbnails import smaller_labels
from segdeconv.errors import UsageError
from segdeconv.serving.label.learning import Example, Kept, Learned, Learner, Scope
from segdeconv.serving.label.network import save_network
from segdeconv.serving.label.storage import PhotoLog, Storage
from segdeconv.serving.label.strokes import IGNORE
from segdeconv.system.memory import available

MAX_SECONDS = 120.0
MAX_EXAMPLES = 64  # photos that one round of learning draws from
MIN_MEMORY, MAX_MEMORY = 256 << 20, 4 << 30  # bytes for what is kept of photos
SEEN_SHARE = 0.25  # of this memory for photos at the size at which the network sees them
VIEW_PIXELS = 1_000_000  # of a proposal as the page shows it
PREVIEW_SIDE = 128
RANKED = 500  # the most uncertain photos, among which the order is found
RANK_EVERY = 10  # photos of the sweep


Version = tuple[int, tuple[int, ...]]  # rounds of learning, and the labels of the classes if there is a proposal


class Proposal(NamedTuple):
    """The network's masks of a photo, as the page shows them.

    Attributes:
        labels: (h, w) uint8 labels.
        uncertainty: (h, w) uint8, the entropy of the probabilities relative to its maximum, 0..255.
        number: The round of learning that it is from.
    """

    labels: np.ndarray
    uncertainty: np.ndarray
    number: int


class Shown(NamedTuple):
    """What a proposal on the page was made of, so that accepting it stores what the person saw.

    Attributes:
        name: The photo.
        number: The round of learning.
        labels: The labels of the classes.
        probabilities: (C, h, w) float32.
    """

    name: str
    number: int
    labels: list[int]
    probabilities: np.ndarray


class Session:
    """A labelling session.

    Args:
        storage: The folder.
        learner: The network.
        saved: Names by label of the classes of a network that the session has saved; None if it starts.
    """

    def __init__(self, storage: Storage, learner: Learner, *, saved: Mapping[int, str] | None = None) -> None:
        self.storage, self.learner = storage, learner
        self.named = dict(saved or {})  # names by label, as the network has them
        self.saved = saved is not None
        self.known = tuple(learner.names)  # classes at the start
        self.names = list(storage.photos)
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.round = 0  # of learning; proposals of earlier ones are out of date
        self.steps = 0
        self.unsaved: str | None = None  # the photo that the page showed when the network learned last
        self.kept: OrderedDict[str, Kept] = OrderedDict()
        self.kept_version = learner.encoder_version
        self.seen: OrderedDict[str, np.ndarray] = OrderedDict()  # photos as the network sees them
        self.shown: Shown | None = None
        free = available(learner.device)
        self.memory = MAX_MEMORY if free is None else max(MIN_MEMORY, min(MAX_MEMORY, free // 4))
        self.examples: dict[str, tuple[PhotoLog, tuple[int, ...], Example]] = {}
        self.measured: dict[str, tuple[Version, Measured]] = {}
        self.previews: dict[str, np.ndarray] = {}
        self.accepted_previews: dict[str, tuple[PhotoLog, np.ndarray]] = {}
        self.unreadable: dict[str, str] = {}
        self.open_order: list[str] = []
        self.since_ranking = 0

    # In any thread

    @property
    def learned(self) -> bool:
        """Whether the network can propose masks: it has been trained, or had all classes by name at the start."""
        names = list(self.storage.classes.names.values())
        return self.saved or self.round > 0 or (len(names) >= 2 and set(self.known).issuperset(names))

    @property
    def version(self) -> Version:
        """The version of the proposals, which changes with every round of learning and with the classes."""
        return self.round, tuple(self.storage.classes.labels) if self.learned else ()

    def order(self) -> list[int]:
        """Return the numbers of the photos as the strip shows them: begun, open by rank, not read yet, accepted."""
        status = {name: log.status for name, log in list(self.storage.logs.items())}
        ranked = [name for name in self.open_order if status.get(name, "none") == "none"]
        known = set(ranked)
        begun = [name for name in self.names if status.get(name) == "strokes"]
        accepted = [name for name in self.names if status.get(name) == "accepted"]
        rest = [name for name in self.names if name not in known and status.get(name, "none") == "none"]
        return [self.numbers[name] for name in (*begun, *ranked, *rest, *accepted)]

    def state(self) -> dict[str, Any]:
        """Return what the page shows of the session."""
        status = {self.numbers[name]: log.status for name, log in list(self.storage.logs.items())}
        newest = self.version
        return {
            "classes": self.storage.classes.to_list(),
            "photos": len(self.names),
            "order": self.order(),
            "begun": [number for number, each in status.items() if each == "strokes"],
            "accepted": [number for number, each in status.items() if each == "accepted"],
            "measured": len(self.measured),
            "current": sum(version == newest for version, _ in list(self.measured.values())),
            "painted": sorted(self.storage.used_labels()),
            "round": self.round,
            "steps": self.steps,
            "learned": self.learned,
            "unreadable": {self.numbers[name]: message for name, message in list(self.unreadable.items())},
            "suggestions": [name for name in self.known if name not in self.storage.classes.names.values()]
            if self.round == 0
            else [],
            "folder": str(self.storage.folder),
        }

    def preview(self, name: str) -> np.ndarray | None:
        """Return small labels of what was accepted of a photo, else of the newest proposal; None without any."""
        log = self.storage.log(name)
        if log.status != "accepted":
            return self.previews.get(name)
        cached = self.accepted_previews.get(name)
        if cached is None or cached[0] is not log:  # reading the mask of a large photo takes long
            height, width = self.storage.size(name)
            scale = min(1.0, PREVIEW_SIDE / max(height, width))
            size = (max(1, round(scale * height)), max(1, round(scale * width)))
            cached = self.accepted_previews[name] = (log, self.storage.mask(name, size))
        return cached[1]

    def accept_shown(self, name: str, number: int) -> bool:
        """Accept a proposal as it was shown, also while the network learns; return whether it is at hand.

        Args:
            name: The photo.
            number: The round of learning that the proposal is from.

        Raises:
            UsageError: A mask is accepted already.
        """
        shown = self.shown
        if shown is None or (shown.name, shown.number) != (name, number):
            return False
        if shown.labels != self.storage.classes.labels:
            return False
        self.storage.accept(name, _labels(shown.probabilities, self.storage.size(name), shown.labels))
        return True

    # In the thread of the network

    def learn(self, name: str, seconds: float, scope: Scope) -> Learned:
        """Learn from all strokes for a while; the network is saved once nobody waits for a proposal.

        Args:
            name: The photo on the page, which is always among the examples.
            seconds: At most MAX_SECONDS.
            scope: See `Learner.learn`.

        Raises:
            UsageError: There are fewer than two classes, or no strokes.
        """
        if len(self.storage.classes.labels) < 2:
            raise UsageError("a network tells classes apart - add a second class, such as background")
        chosen = self._chosen(name)
        if not chosen:
            raise UsageError("there are no strokes to learn from - paint a little of every class first")
        labels = tuple(self._match_classes())
        result = self.learner.learn(
            lambda: [self._example(each, labels) for each in chosen], seconds=min(seconds, MAX_SECONDS), scope=scope
        )
        if result.steps:
            self.round += 1
            self.steps += result.steps
            if self.unsaved is not None:  # somebody has been waiting ever since the round before
                self.save()
            else:
                self.unsaved = name
        return result

    def save(self) -> None:
        """Save the network if it has learned since it was saved."""
        name, self.unsaved = self.unsaved, None
        if name is None:
            return
        with self.storage.guard:  # a class may have been added, renamed or removed since the network learned
            classes = self.storage.classes.classes()
            if classes is None:
                return
            self._match_classes()
        save_network(self.storage.session, self.learner, classes, self.learner.size(self.storage.size(name)))

    def proposal(self, name: str) -> Proposal | None:
        """Return the network's mask of a photo, None before it has learned."""
        if not self.learned:
            return None
        if len(self.storage.classes.labels) < 2:
            return None
        labels = self._match_classes()
        probabilities = self._probabilities(name)
        photo = self.storage.size(name)
        scale = min(1.0, (VIEW_PIXELS / (photo[0] * photo[1])) ** 0.5)
        size = (max(1, round(scale * photo[0])), max(1, round(scale * photo[1])))
        mask = _labels(probabilities, size, labels)
        self.shown = Shown(name, self.round, labels, probabilities)
        entropy = cv2.resize(_entropy(probabilities), size[::-1], interpolation=cv2.INTER_LINEAR)
        return Proposal(mask, np.round(entropy * 255).astype(np.uint8), self.round)

    def accept(self, name: str) -> None:
        """Accept the network's mask of a photo, with what a person painted on it.

        Raises:
            UsageError: The network has not learned yet, or a mask is accepted already.
        """
        if not self.learned or len(self.storage.classes.labels) < 2:
            raise UsageError("there is no proposal yet - paint a little of every class and learn")
        labels = self._match_classes()
        self.storage.accept(name, _labels(self._probabilities(name), self.storage.size(name), labels))

    def sweep(self) -> bool:
        """Save the network or measure one more photo; return False if all is done with the network as it is."""
        if self.unsaved is not None:
            self.save()
            return True
        newest = self.version
        for number in self.order():
            name = self.names[number]
            if name in self.unreadable or (name in self.measured and self.measured[name][0] == newest):
                continue
            try:
                self._measure(name)
            except UsageError as error:
                self.unreadable[name] = str(error)
            self.since_ranking += 1
            if self.since_ranking >= RANK_EVERY or len(self.measured) == len(self.names):
                self._rank()
            return True
        if self.since_ranking:
            self._rank()
        return False

    def _measure(self, name: str) -> None:
        kept = self._keep(name)
        uncertainty, version = 1.0, self.version
        if self.learned and len(self.storage.classes.labels) >= 2:
            labels = self._match_classes()
            probabilities = self._probabilities(name)
            uncertainty = region_uncertainty(_entropy(probabilities))
            indices = _labels(probabilities, probabilities.shape[1:], labels)
            self.previews[name] = smaller_labels(indices, PREVIEW_SIDE)
            version = (self.round, tuple(labels))
        else:  # also after a class was added that the network does not know
            self.previews.pop(name, None)
        self.measured[name] = (version, Measured(Path(name), uncertainty, kept.features))

    def _rank(self) -> None:
        self.since_ranking = 0
        done = {name for name, log in list(self.storage.logs.items()) if log.status != "none"}
        candidates = [image for name, (_, image) in self.measured.items() if name not in done]
        candidates.sort(key=lambda image: -image.uncertainty)
        labelled = [image for name, (_, image) in self.measured.items() if name in done]
        first = [ranked.path.as_posix() for ranked in rank(candidates[:RANKED], labelled[-RANKED:])]
        self.open_order = first + [image.path.as_posix() for image in candidates[RANKED:]]

    def _chosen(self, name: str) -> list[str]:
        done = [each for each, log in list(self.storage.logs.items()) if log.status != "none"]
        others = [each for each in done if each != name]
        if len(others) >= MAX_EXAMPLES:
            others = list(self.learner.random.choice(others, MAX_EXAMPLES - 1, replace=False))
        chosen = [*others, *([name] if name in done else [])]
        for each in set(self.examples) - set(chosen):
            del self.examples[each]
        return chosen

    def _example(self, name: str, labels: tuple[int, ...]) -> Example:
        log = self.storage.log(name)
        cached = self.examples.get(name)
        if cached and cached[0] is log and cached[1] == labels and self.kept_version == self.learner.encoder_version:
            return cached[2]
        if cached and self.kept_version == self.learner.encoder_version:
            kept, image = cached[2].kept, cached[2].image
        else:
            image = self._seen(name)
            kept = self._keep(name, image)
        table = np.full(256, IGNORE, dtype=np.uint8)
        table[list(labels)] = range(len(labels))
        size = (image.shape[0], image.shape[1])
        example = Example(kept, image, table[self.storage.mask(name, size)])
        self.examples[name] = (log, labels, example)
        return example

    def _seen(self, name: str) -> np.ndarray:
        if name not in self.seen:
            image = read_upright(self.storage.photos[name], max_pixels=MAX_PIXELS)[0]
            self.seen[name] = resize_image(image, self.learner.size((image.shape[0], image.shape[1])))
        self.seen.move_to_end(name)
        size = self.seen[name].nbytes
        while len(self.seen) * size > SEEN_SHARE * self.memory and len(self.seen) > 1:
            self.seen.popitem(last=False)
        return self.seen[name]

    def _keep(self, name: str, image: np.ndarray | None = None) -> Kept:
        """Return what is kept of a photo, and forget the photos that were used least recently."""
        if self.kept_version != self.learner.encoder_version:
            self.kept.clear()
            self.examples.clear()
            self.kept_version = self.learner.encoder_version
        if name not in self.kept:
            self.kept[name] = self.learner.keep(self._seen(name) if image is None else image)
        self.kept.move_to_end(name)
        size = self.kept[name].bytes
        while len(self.kept) * size > self.memory and len(self.kept) > 1:
            self.kept.popitem(last=False)
        return self.kept[name]

    def _probabilities(self, name: str) -> np.ndarray:
        """Return the class probabilities of a photo, (C, h, w) float32, averaged over 3x3 pixels.

        Unpooling places single values, and a decoder that has learned from few strokes leaves some of them speckled.
        """
        maps = self.learner.probabilities(self._keep(name)).numpy()
        return np.stack([cv2.blur(map_, (3, 3), borderType=cv2.BORDER_REPLICATE) for map_ in maps])

    def _match_classes(self) -> list[int]:
        """Give the network the classes of the session, and return their labels; a renamed class keeps its weights."""
        names = dict(self.storage.classes.names)
        renamed = {self.named[label]: name for label, name in names.items() if label in self.named}
        labels = sorted(names)
        self.learner.set_classes([names[label] for label in labels], renamed=renamed)
        self.named = names
        return labels


def _labels(probabilities: np.ndarray, size: Size, labels: list[int]) -> np.ndarray:
    """Return the labels of the most probable classes, (*size) uint8, class by class, since photos may be large."""
    best = np.full(size, -1.0, dtype=np.float32)
    mask = np.zeros(size, dtype=np.uint8)
    for label, map_ in zip(labels, probabilities, strict=True):
        map_ = cv2.resize(map_, size[::-1], interpolation=cv2.INTER_LINEAR)
        mask[map_ > best] = label
        np.maximum(best, map_, out=best)
    return mask


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Return the entropy of (C, h, w) probabilities relative to its maximum, (h, w) float32 in 0..1."""
    entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=0) / np.log(len(probabilities))
    return np.clip(entropy, 0, 1).astype(np.float32)
