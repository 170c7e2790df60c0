"""``ddoq-ray calibrate``: the rates of a run's networks on this machine's device, kept for `plan`."""

from __future__ import annotations

from ddoq_ray.config import RunConfig
from ddoq_ray.config.schema import require
from ddoq_ray.execution.workers import say
from ddoq_ray.provenance import hardware
from ddoq_ray.storage.calibration import Rate, add_rates, asked_of, default_file

SECONDS = 6.0  # of each rate, about; five of them and loading make a minute


def main(config: RunConfig) -> None:
    """Measure on the GPU where there is one, else on the processor, and add to the calibration file.

    Raises:
        ValueError: A network cannot be loaded, or the file is none that this command wrote.
    """
    import torch

    from ddoq_ray.models.rates import measured

    require(config.prior.path is not None, "prior.path=null: calibrate measures the networks of a run; give a prior")
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name(0) if gpu else hardware()
    asked = asked_of(config)
    rates: list[Rate] = []
    say(f"calibrate  on {device}: about a minute")
    for what, per_second in measured(config, "cuda" if gpu else "cpu", SECONDS):
        say(f"calibrate  {what:<8} {per_second:,.4g} {'image-steps' if what == 'denoise' else 'images'} a second")
        rates.append({"what": what, "device": device, "gpu": gpu, "per_second": per_second, "asked": asked[what]})
    path = config.cluster.calibration or default_file()
    add_rates(path, rates)
    say(f"calibrate  written to {path}, for runs of these networks and batches")
