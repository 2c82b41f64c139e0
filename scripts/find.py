"""Find a learning rate or a batch size for a config by experiment.

    python scripts/find.py lr [dataset=NAME] [model=NAME] [key=value ...]
    python scripts/find.py batch_size [dataset=NAME] [model=NAME] [key=value ...]

lr trains 100 steps at rising learning rates and reports the one at which the loss falls fastest. batch_size doubles the
batch size until memory runs out and reports time and memory of each. Nothing is written; the trained networks are
discarded.
"""

import sys

from segdeconv.cli.command import run_command
from segdeconv.cli.own_code import compose, with_chosen_keys
from segdeconv.errors import UsageError, did_you_mean

SETTINGS = ("lr", "batch_size")


def main() -> None:
    """Compose the config, prepare it as train.py does, and try values of the chosen setting."""
    setting, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if setting not in SETTINGS:
        raise UsageError(f"unknown setting '{setting}' - {did_you_mean(setting, SETTINGS)}")

    import torch

    from segdeconv.cli.overrides import hydra_overrides
    from segdeconv.system import CONFIGS
    from segdeconv.system.devices import best_device, resolve_precision
    from segdeconv.system.memory import readable
    from segdeconv.training import tuning
    from segdeconv.training.config_check import check_config
    from segdeconv.training.prepare import prepare

    config, choices = compose(arguments)
    config = check_config(with_chosen_keys(config, choices, hydra_overrides(arguments, CONFIGS)))
    accelerator = config["trainer"]["accelerator"]
    device = best_device() if accelerator == "auto" else torch.device({"gpu": "cuda"}.get(accelerator, accelerator))
    precision = resolve_precision(config["trainer"]["precision"])
    prepared = prepare(config)
    config = prepared.config
    if setting == "lr":
        rates = tuning.try_rates(prepared, device, precision, num_workers=config["dataset"]["num_workers"] or 0)
        highest = max(rate.smoothed for rate in rates)
        for rate in rates[:: max(1, len(rates) // 25)]:
            print(f"{rate.lr:9.1e}  {rate.smoothed:8.4f}  {'#' * round(60 * rate.smoothed / highest)}")
        print(f"\nthe loss falls fastest at optimizer.lr={tuning.best_rate(rates):.1e}")
        return
    print("batch size  seconds a step  images a second  memory")
    fits = []
    for fit in tuning.try_batch_sizes(prepared, device, precision, averaged=config["trainer"]["ema"] is not None):
        fits.append(fit)
        speed = fit.batch_size / fit.seconds
        print(f"{fit.batch_size:>10}  {fit.seconds:>14.3f}  {speed:>15.1f}  {readable(fit.memory)}", flush=True)
    if not fits:
        raise UsageError(
            "a batch of one image does not fit into memory - lower dataset.size, dataset.crop or model.width"
        )
    fastest = max(fits, key=lambda fit: fit.batch_size / fit.seconds)
    print(
        f"\nthe largest batch that fits is dataset.batch_size={fits[-1].batch_size}, the fastest per image is "
        f"dataset.batch_size={fastest.batch_size}"
    )


if __name__ == "__main__":
    run_command(main, __doc__)
