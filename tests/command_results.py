"""Short training commands, and the check of a refused one."""

SLIM = (
    "model.stages=[[4],[8]]", "dataset.batch_size=2", "dataset.num_workers=0", "trainer.max_epochs=1",
    "trainer.precision=32-true", "logger=none", "dataset.size=[32,32]", "auto=[]",
)  # fmt: skip


def train(commands, place, *words, **settings):
    return commands("train", *words, *SLIM, "hydra.run.dir=run", cwd=place, **settings)


def train_on_folder(commands, place, *words, **settings):
    return train(commands, place, "dataset=folder", "dataset.root=mine", *words, **settings)


def require_refused(done, place, message):
    """Check for exit code 2 and one error message with a way out, before the first training step."""
    assert done.code == 2, done.out + done.err
    assert message in done.error_message
    assert " - " in done.error_message
    assert "epoch 1" not in done.out
    assert not list(place.rglob("*.ckpt"))
