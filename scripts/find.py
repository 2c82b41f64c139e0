"""Find a learning rate or a batch size for a config, by trying.

    python scripts/find.py lr [dataset=NAME] [model=NAME] [key=value ...]
    python scripts/find.py batch_size [dataset=NAME] [model=NAME] [key=value ...]

lr trains 100 steps at rising rates and names the one where the loss falls fastest. batch_size doubles the batch until
memory ends and shows what each costs. Nothing is written; a network trained here is thrown away.
"""

import sys

from segdeconv.cli.command import run_command
from segdeconv.cli.own_code import compose
from segdeconv.errors import UsageError, did_you_mean

WHAT = ("lr", "batch_size")


def main() -> None:
    """Compose the config, prepare it as train.py does, try."""
    what, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if what not in WHAT:
        raise UsageError(f"the first word is '{what}' - {did_you_mean(what, WHAT)}")

    import torch

    from segdeconv.system.devices import best_device, resolve_precision
    from segdeconv.system.memory import readable
    from segdeconv.training import tuning
    from segdeconv.training.config_check import check_config
    from segdeconv.training.prepare import prepare

    config = check_config(compose(arguments)[0])
    accelerator = config["trainer"]["accelerator"]
    device = best_device() if accelerator == "auto" else torch.device({"gpu": "cuda"}.get(accelerator, accelerator))
    precision = resolve_precision(config["trainer"]["precision"])
    made = prepare(config)
    if what == "lr":
        tried = tuning.try_rates(made, device, precision, num_workers=config["dataset"]["num_workers"] or 0)
        highest = max(rate.smoothed for rate in tried)
        for rate in tried[:: max(1, len(tried) // 25)]:
            print(f"{rate.lr:9.1e}  {rate.smoothed:8.4f}  {'#' * round(60 * rate.smoothed / highest)}")
        print(f"\nthe loss falls fastest at optimizer.lr={tuning.best_rate(tried):.1e}")
        return
    print("batch size  seconds a step  images a second  memory")
    fits = []
    for fit in tuning.try_batch_sizes(made, device, precision, averaged=config["trainer"]["ema"] is not None):
        fits.append(fit)
        speed = fit.batch_size / fit.seconds
        print(f"{fit.batch_size:>10}  {fit.seconds:>14.3f}  {speed:>15.1f}  {readable(fit.memory)}", flush=True)
    if not fits:
        raise UsageError("not even one image fits into memory - lower dataset.size or dataset.crop, or model.width")
    fastest = max(fits, key=lambda fit: fit.batch_size / fit.seconds)
    print(
        f"\nthe largest that fits is dataset.batch_size={fits[-1].batch_size}, the most images a second come with "
        f"dataset.batch_size={fastest.batch_size}"
    )


if __name__ == "__main__":
    run_command(main, __doc__)
