"""What the SegNet paper says about its decoders: table 1, and the orderings that section 3.3 states.

Badrinarayanan, Kendall, Cipolla 2017, https://arxiv.org/abs/1511.00561. The networks are in models/basic.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# The paper's measures, and what report.json calls them.
SCORES = {"G": "pixel_accuracy", "C": "mean_accuracy", "mIoU": "miou", "BF": "boundary_f1"}
CLASS_WEIGHTINGS = ("median_frequency", "none")


class Variant(NamedTuple):
    """A row of table 1.

    model: its file in configs/model. parameters: in millions. storage: multiple of what SegNet-Basic stores, None where
    the paper has n/a. milliseconds: of a forward pass. scores: G, C, mIoU and BF in percent on CamVid's test images, by
    the class weighting of the loss.
    """

    name: str
    model: str
    parameters: float
    storage: int | None
    milliseconds: float
    scores: Mapping[str, tuple[float, float, float, float]]


def _published(*percents: float) -> dict[str, tuple[float, float, float, float]]:
    balanced, natural = percents[:4], percents[4:]
    return dict(zip(CLASS_WEIGHTINGS, (balanced, natural), strict=True))  # type: ignore[arg-type]


VARIANTS = (
    Variant("Bilinear-Interpolation", "bilinear_interpolation", 0.625, 0, 24.2,
            _published(77.9, 61.1, 43.3, 20.83, 82.7, 52.5, 43.8, 23.08)),
    Variant("SegNet-Basic", "segnet_basic", 1.425, 1, 52.6,
            _published(82.7, 62.0, 47.7, 35.78, 84.0, 54.6, 46.3, 36.67)),
    Variant("SegNet-Basic-EncoderAddition", "segnet_basic_encoder_addition", 1.425, 64, 53.0,
            _published(83.4, 63.6, 48.5, 35.92, 84.2, 56.5, 47.7, 36.27)),
    Variant("SegNet-Basic-SingleChannelDecoder", "segnet_basic_single_channel_decoder", 0.625, 1, 33.1,
            _published(81.2, 60.7, 46.1, 31.62, 83.5, 53.9, 45.2, 32.45)),
    Variant("FCN-Basic", "fcn_basic", 0.65, 11, 24.2,
            _published(81.7, 62.4, 47.3, 38.11, 83.9, 55.6, 45.0, 37.33)),
    Variant("FCN-Basic-NoAddition", "fcn_basic_no_addition", 0.65, None, 23.8,
            _published(80.5, 58.6, 44.1, 31.96, 82.3, 53.9, 44.2, 29.43)),
    Variant("FCN-Basic-NoDimReduction", "fcn_basic_no_dim_reduction", 1.625, 64, 44.8,
            _published(84.1, 63.4, 50.1, 37.37, 83.5, 57.3, 47.0, 37.13)),
    Variant("FCN-Basic-NoAddition-NoDimReduction", "fcn_basic_no_addition_no_dim_reduction", 1.625, 0, 43.9,
            _published(80.5, 61.6, 45.9, 30.47, 83.7, 54.8, 45.5, 33.17)),
)  # fmt: skip
BY_MODEL = {variant.model: variant for variant in VARIANTS}


# The orderings that the paper states, and no others.

Key = tuple[str, str]  # class weighting, model
ScoreOf = Callable[[Key, str], float | None]


class Comparison(NamedTuple):
    """That some networks score above others: all of them above all others, or the best of them above all others."""

    above: tuple[Key, ...]
    below: tuple[Key, ...]
    best: bool = False

    def margin(self, score_of: Callable[[Key], float | None]) -> float | None:
        """By how many points it holds; negative where it does not, None where a score is missing."""
        scores = {key: score for key in (*self.above, *self.below) if (score := score_of(key)) is not None}
        if len(scores) < len(self.above) + len(self.below):
            return None
        above, below = ([scores[key] for key in keys] for keys in (self.above, self.below))
        pick = max if self.best else min
        return pick(above) - max(below)


class Ordering(NamedTuple):
    """A sentence of the paper's about one score, and the comparisons that it means.

    most: whether the sentence says no more than that most of them hold.
    """

    claim: str
    class_weighting: str
    score: str
    comparisons: tuple[Comparison, ...]
    most: bool = False


def orderings(class_weightings: Sequence[str]) -> list[Ordering]:
    """Section 3.3 of the paper, for networks trained with these class weightings of the loss.

    The last three need both. What the paper says of every measure is one ordering for each of the four.
    """
    models = list(BY_MODEL)
    keeping = ("segnet_basic_encoder_addition", "fcn_basic_no_dim_reduction")
    larger = (
        ("segnet_basic", "segnet_basic_single_channel_decoder"),
        ("fcn_basic_no_dim_reduction", "fcn_basic"),
        ("fcn_basic_no_addition_no_dim_reduction", "fcn_basic_no_addition"),
    )
    stated = []
    for class_weighting in class_weightings:
        fixed = (class_weighting, "bilinear_interpolation")
        learned = tuple((class_weighting, model) for model in models if model != fixed[1])
        full = tuple((class_weighting, model) for model in keeping)
        others = tuple((class_weighting, model) for model in models if model not in keeping)
        pairs = tuple(Comparison(((class_weighting, big),), ((class_weighting, small),)) for big, small in larger)
        for claim, comparisons in (
            ("bilinear interpolation without learning is the worst", (Comparison(learned, (fixed,)),)),
            ("the best stores the encoder's maps in full", (Comparison(full, others, best=True),)),
            ("a larger decoder is better for a given encoder", pairs),
        ):
            stated += [Ordering(claim, class_weighting, score, comparisons) for score in SCORES]
    if set(CLASS_WEIGHTINGS) <= set(class_weightings):
        balanced, natural = (
            tuple((class_weighting, model) for model in models) for class_weighting in CLASS_WEIGHTINGS
        )
        for claim, score, above, below in (
            ("balancing raises the accuracy by class", "C", balanced, natural),
            ("balancing mostly raises the IoU", "mIoU", balanced, natural),
            ("without balancing more pixels are right", "G", natural, balanced),
        ):
            both = zip(above, below, strict=True)
            comparisons = tuple(Comparison((up,), (down,)) for up, down in both)
            stated.append(Ordering(claim, "both", score, comparisons, most=score == "mIoU"))
    return stated


class Verdict(NamedTuple):
    """What became of an ordering.

    margins: of its comparisons, in points. holds: whether all of them hold, or most where the sentence says no more;
    None where one of them is not known.
    """

    margins: tuple[float | None, ...]
    holds: bool | None


def judge(ordering: Ordering, score_of: ScoreOf) -> Verdict:
    """score_of: from a network and the name of a score to its value."""
    margins = tuple(comparison.margin(lambda key: score_of(key, ordering.score)) for comparison in ordering.comparisons)
    known = [margin for margin in margins if margin is not None]
    if len(known) < len(margins):
        return Verdict(margins, None)
    held = sum(margin > 0 for margin in known)
    return Verdict(margins, 2 * held > len(known) if ordering.most else held == len(known))


def published(key: Key, score: str) -> float | None:
    """The paper's own number."""
    class_weighting, model = key
    return BY_MODEL[model].scores[class_weighting][list(SCORES).index(score)]
