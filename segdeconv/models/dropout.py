"""Places of dropout in Bayesian SegNet, which keeps dropout active in inference.

Kendall, Badrinarayanan, Cipolla 2017, sections 3 and 4, https://arxiv.org/abs/1511.02680. VGG16 has six dropouts in its
deeper half, as in the authors' training file, and SegNet-Basic has four:

    image -> stage1 pool1 - stage2 pool2 - stage3 pool3 DROP - stage4 pool4 DROP - stage5 pool5 DROP
               |switches      |switches      |switches           |switches           |switches
    logits <- decoder1 --- decoder2 --- DROP decoder3 ----- DROP decoder4 ----- DROP decoder5

decoder5 is the stage that unpools the map of pool5, conv5_3_D to conv5_1_D in the authors' files.
"""

from typing import Literal

DropoutAt = Literal["none", "central", "encoder", "decoder", "encoder_decoder", "center", "classifier", "voc"]


def dropout_places(dropout_at: DropoutAt, stages: int) -> list[str]:
    """Return the names of the places at which a network has dropout.

    Args:
        dropout_at: Name of a set of places. `central`: after each pool and each decoder stage of the deeper half,
            rounded up, which is the best in the paper. `encoder`, `decoder`, `encoder_decoder`: after every pool, after
            every decoder stage, or both. `center`: after the deepest pool. `classifier`: before the classifier.
            `voc`: the ten places of the authors' file for PASCAL VOC, which are before every pool, after the deepest
            pool, and after every decoder stage but the last.
        stages: Number of stages of the encoder.

    Examples:
        >>> dropout_places("central", 5)
        ['pool3', 'pool4', 'pool5', 'decoder5', 'decoder4', 'decoder3']
        >>> dropout_places("central", 4)
        ['pool3', 'pool4', 'decoder4', 'decoder3']
    """
    every = range(1, stages + 1)
    deeper = range(stages // 2 + 1, stages + 1)
    before_pool, after_pool, after_decoder = {
        "none": ([], [], []),
        "central": ([], deeper, deeper),
        "encoder": ([], every, []),
        "decoder": ([], [], every),
        "encoder_decoder": ([], every, every),
        "center": ([], every[-1:], []),
        "classifier": ([], [], every[:1]),
        "voc": (every, every[-1:], every[1:]),
    }[dropout_at]
    return [
        *(f"stage{number}" for number in before_pool),
        *(f"pool{number}" for number in after_pool),
        *(f"decoder{number}" for number in reversed(after_decoder)),
    ]
