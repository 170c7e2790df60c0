"""The scheduler of a prior's folder, or another one over the same noise levels.

What belongs to the training (betas, number of timesteps, what the network predicts) is the folder's in every case; what
belongs to the solver is as latent diffusion wants it.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

FOLDER = "folder"
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
        ValueError: no such scheduler, or one whose noise levels a chosen one cannot take over.
    """
    name = str(config.get("_class_name"))
    if choice == FOLDER:
        own = getattr(diffusers, name, None)
        if own is None or not hasattr(own, "from_config"):
            raise ValueError(f"prior: diffusers has no scheduler {name!r}; mend scheduler/scheduler_config.json")
        return own.from_config(config)
    if choice not in SCHEDULERS:
        raise ValueError(f"prior.scheduler={choice}: expected one of {FOLDER}, {', '.join(SCHEDULERS)}")
    if not {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"} <= set(config):
        raise ValueError(
            f"prior.scheduler={choice} takes over the folder's betas, and its {name} has none in "
            f"scheduler_config.json; use prior.scheduler={FOLDER}"
        )
    made, forced, otherwise = SCHEDULERS[choice]
    taken = inspect.signature(made.__init__).parameters
    return made.from_config({key: value for key, value in (otherwise | config | forced).items() if key in taken})
