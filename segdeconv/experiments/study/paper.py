"""The SegNet paper's results on decoders: table 1, and the orderings that section 3.3 states.

Badrinarayanan, Kendall, Cipolla 2017, https://arxiv.org/abs/1511.00561. The networks are in models/basic.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# The paper's scores and their keys in report.json.
SCORES = {"G": "pixel_accuracy", "C": "mean_accuracy", "mIoU": "miou", "BF": "boundary_f1"}
CLASS_WEIGHTINGS = ("median_frequency", "none")


class Variant(NamedTuple):
    """A row of table 1.

    Attributes:
        name: Name of the network in the paper.
        model: Name of its file in configs/model.
        parameters: Number of parameters in millions.
        storage: Memory of the encoder's stored features as a multiple of SegNet-Basic's; None where the paper has n/a.
        milliseconds: Time of a forward pass.
        scores: G, C, mIoU and BF in percent on CamVid's test images, by the class weighting of the loss.
    """

    name: str
    model: str
    parameters: float
    storage: int | None
    milliseconds: float
    scores: Mapping[str, tuple[float, float, float, float]]


def _published(*percents: float) -> dict[str, tuple[float, float, float, float]]:
    weighted, unweighted = percents[:4], percents[4:]
    return dict(zip(CLASS_WEIGHTINGS, (weighted, unweighted), strict=True))  # type: ignore[arg-type]


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


# Only the orderings that the paper states.

Key = tuple[str, str]  # class weighting, model
ScoreOf = Callable[[Key, str], float | None]


class Comparison(NamedTuple):
    """A claim that some networks score higher than others.

    Attributes:
        above: Networks that should score higher.
        below: Networks that should score lower than all of `above`.
        best: Only the best of `above` has to score higher than all of `below`.
    """

    above: tuple[Key, ...]
    below: tuple[Key, ...]
    best: bool = False

    def margin(self, score_of: Callable[[Key], float | None]) -> float | None:
        """Return the margin of the comparison in points; negative if it does not hold, None if a score is missing."""
        scores = {key: score for key in (*self.above, *self.below) if (score := score_of(key)) is not None}
        if len(scores) < len(self.above) + len(self.below):
            return None
        above, below = ([scores[key] for key in keys] for keys in (self.above, self.below))
        pick = max if self.best else min
        return pick(above) - max(below)


class Ordering(NamedTuple):
    """A sentence of the paper about one score, and the comparisons that it makes.

    Attributes:
        claim: The sentence.
        class_weighting: Class weighting of the networks that are compared, or `both`.
        score: Key of `SCORES`.
        comparisons: The comparisons.
        most: The sentence only claims that most of the comparisons hold.
    """

    claim: str
    class_weighting: str
    score: str
    comparisons: tuple[Comparison, ...]
    most: bool = False


def orderings(class_weightings: Sequence[str]) -> list[Ordering]:
    """Return the orderings of section 3.3 of the paper for networks trained with these class weightings of the loss.

    The last three orderings compare the two class weightings. A claim about every score yields four orderings.
    """
    models = list(BY_MODEL)
    storing = ("segnet_basic_encoder_addition", "fcn_basic_no_dim_reduction")
    larger = (
        ("segnet_basic", "segnet_basic_single_channel_decoder"),
        ("fcn_basic_no_dim_reduction", "fcn_basic"),
        ("fcn_basic_no_addition_no_dim_reduction", "fcn_basic_no_addition"),
    )
    stated = []
    for class_weighting in class_weightings:
        fixed = (class_weighting, "bilinear_interpolation")
        learned = tuple((class_weighting, model) for model in models if model != fixed[1])
        full_maps = tuple((class_weighting, model) for model in storing)
        others = tuple((class_weighting, model) for model in models if model not in storing)
        pairs = tuple(Comparison(((class_weighting, big),), ((class_weighting, small),)) for big, small in larger)
        for claim, comparisons in (
            ("bilinear interpolation without learning is the worst", (Comparison(learned, (fixed,)),)),
            ("the best stores the encoder's maps in full", (Comparison(full_maps, others, best=True),)),
            ("a larger decoder is better for a given encoder", pairs),
        ):
            stated += [Ordering(claim, class_weighting, score, comparisons) for score in SCORES]
    if set(CLASS_WEIGHTINGS) <= set(class_weightings):
        weighted, unweighted = (
            tuple((class_weighting, model) for model in models) for class_weighting in CLASS_WEIGHTINGS
        )
        for claim, score, above, below in (
            ("class weighting raises the mean accuracy", "C", weighted, unweighted),
            ("class weighting mostly raises the mean IoU", "mIoU", weighted, unweighted),
            ("more pixels are correct without class weighting", "G", unweighted, weighted),
        ):
            pairs = tuple(Comparison((up,), (down,)) for up, down in zip(above, below, strict=True))
            stated.append(Ordering(claim, "both", score, pairs, most=score == "mIoU"))
    return stated


class Verdict(NamedTuple):
    """The outcome of an ordering.

    Attributes:
        margins: Margins of its comparisons in points; None where a score is missing.
        holds: True if all comparisons hold, or most of them for an ordering with `most`; None if a score is missing.
    """

    margins: tuple[float | None, ...]
    holds: bool | None


def judge(ordering: Ordering, score_of: ScoreOf) -> Verdict:
    """Check an ordering.

    Args:
        ordering: The ordering.
        score_of: Function of a network and a key of `SCORES` that returns the score, or None if it is missing.
    """
    margins = tuple(comparison.margin(lambda key: score_of(key, ordering.score)) for comparison in ordering.comparisons)
    known = [margin for margin in margins if margin is not None]
    if len(known) < len(margins):
        return Verdict(margins, None)
    num_held = sum(margin > 0 for margin in known)
    return Verdict(margins, 2 * num_held > len(known) if ordering.most else num_held == len(known))


def published(key: Key, score: str) -> float | None:
    """Return a score that the paper reports, in percent."""
    class_weighting, model = key
    return BY_MODEL[model].scores[class_weighting][list(SCORES).index(score)]
