"""Bayesian SegNet: SegNet, and dropout at the places of a table that is left on when the network is used.

Kendall, Badrinarayanan, Cipolla 2017, sections 3 and 4, https://arxiv.org/abs/1511.02680. With six dropouts of VGG16's
deeper half, as in the authors' training file, or four in SegNet-Basic:

    image -> stage1 pool1 - stage2 pool2 - stage3 pool3 DROP - stage4 pool4 DROP - stage5 pool5 DROP
               |switches      |switches      |switches           |switches           |switches
    logits <- decoder1 --- decoder2 --- DROP decoder3 ----- DROP decoder4 ----- DROP decoder5

decoder5 is what becomes of the map that pool5 made once it is unpooled: in the authors' files conv5_3_D to conv5_1_D.
"""

from typing import Literal

DropoutAt = Literal["none", "central", "encoder", "decoder", "encoder_decoder", "center", "classifier", "voc"]


def dropout_places(dropout_at: DropoutAt, stages: int) -> list[str]:
    """The places of a network of so many stages at which it drops.

    `central`: after each pool and each stage of the decoder in the deeper half, rounded up; the paper's best.
    `encoder`, `decoder`, `encoder_decoder`: after every pool, every stage of the decoder, both.
    `center`: after the deepest pool alone. `classifier`: before the classifier alone.
    `voc`: the ten of the authors' file for PASCAL VOC: before every pool, after the deepest one, and after the
        decoder's stages but the last.

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
