"""``ddoq-ray calibrate``: the rates of a run's networks on this machine's device, kept for `plan`."""

from __future__ import annotations

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import require
from ddoq_ray.execution.workers import say
from ddoq_ray.provenance import hardware
from ddoq_ray.storage.calibration import BATCHES, Rate, add_rates, asked_of, default_file

SECONDS = 6.0  # of each rate, about; five of them and loading make a minute


def main(config: RunConfig) -> None:
    """Measure on the GPU where there is one, else on the processor, and add to the calibration file.

    Raises:
        ValueError: A network cannot be loaded, or the file cannot be written, or is none that this command wrote.
    """
    import torch

    from ddoq_ray.models.rates import measured

    require(config.prior.path is not None, "prior.path=null: calibrate measures the networks of a run; give a prior")
    path = config.cluster.calibration or default_file()
    add_rates(path, [])  # a place that cannot be written is said now, not after the minute
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name(0) if gpu else hardware()
    asked = asked_of(config)
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else 0
    rates: list[Rate] = []
    say(f"calibrate  on {device}: about a minute")
    try:
        for what, per_second, peak in measured(config, "cuda" if gpu else "cpu", SECONDS):
            held = f", {peak / 1e9:,.3g} GB of the GPU's {memory / 1e9:,.3g} GB" if gpu else ""
            items = "image-steps" if what == "denoise" else "images"
            say(f"calibrate  {what:<8} {per_second:,.4g} {items} a second{held}")
            rates.append(
                {
                    "what": what,
                    "device": device,
                    "gpu": gpu,
                    "per_second": per_second,
                    "peak_bytes": peak,
                    "memory_bytes": memory,
                    "asked": asked[what],
                }
            )
    except torch.OutOfMemoryError as error:
        done = {rate["what"] for rate in rates}
        at = next((what for what in BATCHES if what not in done), "the networks")
        raise ValueError(
            f"{at}: this GPU's {memory / 1e9:,.3g} GB are too few for its batch ({BATCHES.get(at, 'the networks')}); "
            f"choose a smaller one. {' '.join(str(error).split())[:200]}"
        ) from None
    add_rates(path, rates)
    say(f"calibrate  written to {path}, for runs of these networks and batches")
