"""Folders given to the real commands, and what a refusal looks like."""

SLIM = (
    "model.stages=[[4],[8]]", "dataset.batch_size=2", "dataset.num_workers=0", "trainer.max_epochs=1",
    "trainer.precision=32-true", "logger=none", "dataset.size=[32,32]",
)  # fmt: skip


def train(commands, place, *words, **settings):
    return commands("train", *words, *SLIM, "hydra.run.dir=run", cwd=place, **settings)


def of_folder(commands, place, *words, **settings):
    return train(commands, place, "dataset=folder", "dataset.root=mine", *words, **settings)


def require_refused(done, place, words):
    """Exit code 2 and one sentence with a way out, before anything was trained."""
    assert done.code == 2, done.out + done.err
    assert words in done.sentence
    assert " - " in done.sentence
    assert "epoch 1" not in done.out
    assert not list(place.rglob("*.ckpt"))
