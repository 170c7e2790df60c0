"""What every diffusion prior shares: schedules, strength, the start of a trajectory, inversion, step noise.

A kind of prior brings its network and what conditions it; `DiffusionPrior` and `Sampler` do the rest.

Shape suffixes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddoq_ray.models.priors.base import STARTS, Prior, Sampling

# (z [B, C, h, w] as the network takes it, timestep, guidance) -> the network's output; more than C channels only for a
# variance that the scheduler takes.
Predict = Callable[[Tensor, Tensor, float], Tensor]


class Sampler:
    """A diffusers scheduler, and trajectories along it on a device.

    Attributes:
        scheduler: as it was loaded; its state is never used, only its configuration.
        device: where the latents are.
    """

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        """Take any scheduler with add_noise and step."""
        if not hasattr(scheduler, "add_noise"):
            raise ValueError(f"prior: the scheduler {type(scheduler).__name__} has no add_noise; use DDIM or DDPM")
        self.scheduler = scheduler
        self.device = device

    def steps_run(self, how: Sampling) -> int:
        """How many steps are run.

        Raises:
            ValueError: settings that the scheduler cannot run.
        """
        trained = self.scheduler.config["num_train_timesteps"]
        if how.start not in STARTS:
            raise ValueError(f"prior: expected a start of {list(STARTS)}, got {how.start!r}")
        if not 1 <= how.steps <= trained:
            raise ValueError(f"prior: steps must lie in 1 .. {trained}, got {how.steps}")
        if not 0.0 <= how.strength <= 1.0:
            raise ValueError(f"prior: strength must lie in [0, 1], got {how.strength}")
        if how.start == "inversion":
            self._check_inversion()
        run = how.steps if how.start == "noise" else steps_of(how.strength, how.steps)
        if run:
            try:
                self.schedule(run, how.steps)
            except (AssertionError, IndexError, TypeError, ZeroDivisionError) as error:
                raise ValueError(
                    f"prior: {type(self.scheduler).__name__} cannot do synthesizer.steps={how.steps} "
                    f"({error}); choose another number, or a DDIMScheduler in the prior's scheduler folder"
                ) from error
        return run

    def _check_inversion(self) -> None:
        if not (hasattr(self.scheduler, "alphas_cumprod") and float(self.scheduler.init_noise_sigma) == 1.0):
            raise ValueError(
                f"prior: start=inversion needs a variance-preserving scheduler such as DDIM, "
                f"not {type(self.scheduler).__name__}"
            )
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prior: inversion needs prediction_type epsilon or v_prediction, not {kind!r}")

    def schedule(self, run: int, steps: int) -> tuple[Any, Tensor]:
        """A scheduler at the start of the last `run` of `steps` timesteps, and these timesteps."""
        # A fresh one a call: multistep ones carry state, which a retried unit must not see.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        first = max(steps - run, 0) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return scheduler, scheduler.timesteps[first:]

    def noise_scales(self, strength: float, steps: int) -> tuple[float, float]:
        """See `Prior.noise_scales`."""
        run = steps_of(strength, steps)
        if run == 0:
            raise ValueError(f"prior: expected a strength above 0, got {strength}")
        scheduler, timesteps = self.schedule(run, steps)
        zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        scales = [scheduler.add_noise(a, b, timesteps[:1].cpu()) for a, b in ((one, zero), (zero, one))]
        return float(scales[0]), float(scales[1])

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        predict: Predict,
        how: Sampling,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Denoised latents [B, C, h, w] of centroids z, both float32 on the device; the arguments of `synthesize`."""
        run = self.steps_run(how)
        if run == 0:
            return z
        scheduler, timesteps = self.schedule(run, how.steps)
        if how.start == "noise":
            z = noise * scheduler.init_noise_sigma
        elif how.start == "inversion":
            z = self.invert(z, predict, timesteps)
        elif how.start == "noised":
            z = scheduler.add_noise(z, noise, timesteps[:1].expand(len(z)))
        options = step_noise(scheduler, generators)
        for t in timesteps:
            output = predict(scheduler.scale_model_input(z, t), t, how.guidance)
            z = scheduler.step(output, t, z, **options).prev_sample
        return z

    def invert(self, z: Tensor, predict: Predict, timesteps: Tensor) -> Tensor:
        """Deterministic DDIM inversion of z up to the noise level of timesteps[0], without guidance.

        Each step is DDIM's formula read upwards, the noise being predicted at the level that is reached; the
        levels are those the denoising passes, so that small steps bring z back.
        Source: Song et al., Denoising Diffusion Implicit Models, Eq. 12; diffusers' DDIMInverseScheduler.
        """
        alphas = self.scheduler.alphas_cumprod.to(self.device)
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        alpha = torch.as_tensor(getattr(self.scheduler, "final_alpha_cumprod", 1.0), device=self.device)
        for t in timesteps.flip(0):
            output = predict(z, t, 1.0)[:, : z.shape[1]]
            signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
            if kind == "epsilon":
                eps = output
                clean = (z - sigma * eps) / signal
            else:  # v_prediction: there is no third that `_check_inversion` lets through
                clean, eps = signal * z - sigma * output, signal * output + sigma * z
            alpha = alphas[t]
            z = alpha.sqrt() * clean + (1 - alpha).sqrt() * eps
        return z


class DiffusionPrior(Prior):
    """A prior that denoises: a subclass sets what `Prior` lists, `sampler`, and says how its network is asked."""

    sampler: Sampler

    @property
    def scheduler(self) -> Any:
        """The diffusers scheduler."""
        return self.sampler.scheduler

    @abstractmethod
    def check_condition(self, condition: Tensor | None, rows: int) -> None:
        """Raise a ValueError unless `condition` conditions that many images."""

    @abstractmethod
    def predict(self, z: Tensor, t: Tensor, condition: Tensor | None, guidance: float) -> Tensor:
        """The network's output at z [B, C, h, w] and timestep t, guided; `condition` is on the device."""

    @torch.inference_mode()
    def synthesize(
        self,
        latents: Tensor,
        condition: Tensor | None,
        noise: Tensor,
        how: Sampling,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """See `Prior`."""
        self.check_batch(latents, noise, generators)
        self.check_condition(condition, len(latents))
        self._check_guidance(how)
        y = None if condition is None else condition.to(self.device)

        def predict(z: Tensor, t: Tensor, guidance: float) -> Tensor:
            return self.predict(z, t, y, guidance)

        z, e = (x.to(self.device, torch.float32) for x in (latents, noise))
        return self.decode(self.sampler.sample(z, e, predict, how, generators))

    def noise_scales(self, strength: float, steps: int) -> tuple[float, float]:
        """See `Prior`."""
        return self.sampler.noise_scales(strength, steps)

    def check_settings(self, how: Sampling) -> int:
        """See `Prior`."""
        self._check_guidance(how)
        return self.sampler.steps_run(how)

    def _check_guidance(self, how: Sampling) -> None:
        if how.guidance != 1.0 and not self.has_null:
            raise ValueError(
                f"prior: guidance {how.guidance} needs a null label, which this model lacks; use guidance=1"
            )


def steps_of(strength: float, steps: int) -> int:
    """How many of the last timesteps a strength runs."""
    run = min(int(steps * strength + 1e-9), steps)  # 0.29 * 100 is 28.999... in binary
    if run == 0 and strength > 0:
        raise ValueError(
            f"prior: strength {strength} of {steps} steps runs none of them; use strength=0 for a plain "
            f"decode or at least {math.ceil(1e4 / steps) / 1e4:g}, or more steps"
        )
    return run


def step_noise(scheduler: Any, generators: Sequence[torch.Generator] | None) -> dict[str, Any]:
    """The step noise's source. Without generators it is a fixed one of the batch, never the global one."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": list(generators) if generators is not None else torch.Generator().manual_seed(0)}
