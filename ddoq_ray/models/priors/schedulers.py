"""The scheduler of a prior's folder, or another one over the same noise levels.

What belongs to the training (betas, number of timesteps, what the network predicts) is the folder's in every case; what
belongs to the solver is as latent diffusion wants it.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from ddoq_ray.models.folders import first_line

FOLDER = "folder"
LEARNED = ("learned", "learned_range")  # variance types that a network predicts
_ZERO_SNR = "rescale_betas_zero_snr"
# name -> class, settings that are forced, settings where the folder says nothing. Latents are not clipped, as pixels
# are by diffusers' default. PNDM without its Runge-Kutta start, in whose middle no trajectory can begin (Stable
# Diffusion's own folders say so too). DPM-Solver++ takes the whole output for noise, so no variance may be in it.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}, {"clip_sample": False}),
    "pndm": (PNDMScheduler, {}, {"skip_prk_steps": True}),
    "dpm++2m": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "variance_type": None},
        {},
    ),
}


def make_scheduler(config: dict[str, Any], choice: str = FOLDER) -> Any:
    """A scheduler.

    Args:
        config: the folder's scheduler_config.json.
        choice: a name of SCHEDULERS, or "folder" for the class that `config` names.

    Raises:
        ValueError: no such scheduler, a config that it cannot use, or noise levels that a chosen one cannot take over.
    """
    name = str(config.get("_class_name"))
    if choice == FOLDER:
        own = getattr(diffusers, name, None)
        if own is None or not hasattr(own, "from_config"):
            raise ValueError(f"prior: diffusers has no scheduler {name!r}; mend scheduler/scheduler_config.json")
        # A config that was DDPM's keeps its variance_type under every solver it is handed on to.
        unused = config.get("variance_type") in LEARNED and not _takes_variance(own)
        return _made(own, config | {"variance_type": None} if unused else config)
    if choice not in SCHEDULERS:
        raise ValueError(f"prior.scheduler={choice}: expected one of {FOLDER}, {', '.join(SCHEDULERS)}")
    if not {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"} <= set(config):
        raise ValueError(
            f"prior.scheduler={choice} takes over the folder's betas, and its {name} has none in "
            f"scheduler_config.json; use prior.scheduler={FOLDER}"
        )
    made, forced, otherwise = SCHEDULERS[choice]
    taken = inspect.signature(made.__init__).parameters
    if config.get(_ZERO_SNR) and _ZERO_SNR not in taken:
        raise ValueError(
            f"prior.scheduler={choice} cannot follow the folder's {_ZERO_SNR}: its noise levels would be others than "
            f"the prior was trained with; use prior.scheduler={FOLDER} or another"
        )
    return _made(made, {key: value for key, value in (otherwise | config | forced).items() if key in taken})


def check_variance(scheduler: Any, predicted: bool) -> None:
    """Raise a ValueError where the scheduler wants a variance that the denoiser does not predict."""
    kind = scheduler.config.get("variance_type")
    if kind in LEARNED and not predicted:
        raise ValueError(
            f"prior: the scheduler has variance_type={kind} and the denoiser predicts no variance; set it to "
            '"fixed_small" in scheduler/scheduler_config.json, or give the scheduler that the denoiser was trained with'
        )


def _made(scheduler: Any, config: dict[str, Any]) -> Any:
    try:
        return scheduler.from_config(config)
    except Exception as error:  # each of diffusers' schedulers has its own for a value that it cannot use
        raise ValueError(
            f"prior: scheduler/scheduler_config.json gives no {scheduler.__name__}: {first_line(error)}"
        ) from error


def _takes_variance(scheduler: Any) -> bool:
    """Whether its steps use a variance that the network predicts, as DDPM's do."""
    variance = getattr(scheduler, "_get_variance", None)
    return variance is not None and "predicted_variance" in inspect.signature(variance).parameters
