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
from torch import Tensor, nn

from ddoq_ray.models.folders import first_line
from ddoq_ray.models.priors.base import STARTS, Prior, Sampling
from ddoq_ray.models.priors.schedulers import LEARNED

# (z [B, C, h, w] as the network takes it, timestep, guidance) -> the network's output; more than C channels only for a
# variance that the scheduler takes.
Predict = Callable[[Tensor, Tensor, float], Tensor]
_NEEDED = ("add_noise", "step", "set_timesteps", "scale_model_input", "init_noise_sigma", "order")


class Sampler:
    """A diffusers scheduler, and trajectories along it on a device.

    Attributes:
        scheduler: as it was loaded; its state is never used, only its configuration.
        device: where the latents are.
    """

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        """Take any scheduler that has what a trajectory needs."""
        absent = [name for name in _NEEDED if not hasattr(scheduler, name)]
        absent += ["num_train_timesteps"] if scheduler.config.get("num_train_timesteps") is None else []
        if absent:
            raise ValueError(
                f"prior: the scheduler {type(scheduler).__name__} has no {' and no '.join(absent)}, so no latent can "
                "be noised and denoised by it; give a prior of DDIM's or DDPM's kind"
            )
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
        if how.start in ("inversion", "guided"):
            self._check_clean(how.start)
        if how.start == "guided":
            _check_guide(how)
        run = how.steps if how.start in ("noise", "guided") else steps_of(how.strength, how.steps)
        if run:
            try:
                self.schedule(run, how.steps)
            except (AssertionError, IndexError, TypeError, ZeroDivisionError) as error:
                raise ValueError(
                    f"prior: {type(self.scheduler).__name__} cannot do synthesizer.steps={how.steps} "
                    f"({error}); choose another number, or a DDIMScheduler in the prior's scheduler folder"
                ) from error
        return run

    def tried(self, how: Sampling) -> int:
        """`steps_run`, with every step tried on a latent of one value: some schedulers say only there what they lack.

        Raises:
            ValueError: settings that the scheduler cannot run.
        """
        run = self.steps_run(how)
        if not run:
            return 0
        one = torch.ones(1, 1, 1, 1, device=self.device)
        channels = 2 if self.scheduler.config.get("variance_type") in LEARNED else 1
        try:
            scheduler, timesteps = self.schedule(run, how.steps)
            z = scheduler.add_noise(one, one, timesteps[:1])
            for t in timesteps:
                scheduler.scale_model_input(z, t)
                z = scheduler.step(one.expand(1, channels, 1, 1), t, z, **step_noise(scheduler, None)).prev_sample
        except Exception as error:  # each of diffusers' schedulers has its own
            raise ValueError(
                f"prior: {type(self.scheduler).__name__} cannot run synthesizer.steps={how.steps} ({first_line(error)})"
                "; take prior.scheduler=ddim, or mend scheduler/scheduler_config.json"
            ) from error
        return run

    def _check_clean(self, start: str) -> None:
        """Raise a ValueError unless the clean latent follows from the network's output by a known formula."""
        if not (hasattr(self.scheduler, "alphas_cumprod") and float(self.scheduler.init_noise_sigma) == 1.0):
            raise ValueError(
                f"prior: start={start} needs a variance-preserving scheduler such as DDIM, "
                f"not {type(self.scheduler).__name__}"
            )
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prior: start={start} needs prediction_type epsilon or v_prediction, not {kind!r}")

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
        centroids = z
        if how.start in ("noise", "guided"):
            z = noise * scheduler.init_noise_sigma
        elif how.start == "inversion":
            z = self.invert(z, predict, timesteps)
        elif how.start == "noised":
            z = scheduler.add_noise(z, noise, timesteps[:1].expand(len(z)))
        options = step_noise(scheduler, generators)
        for t in timesteps:
            output = predict(scheduler.scale_model_input(z, t), t, how.guidance)
            if how.start == "guided":
                output = self.guided(output, z, t, centroids, how)
            z = scheduler.step(output, t, z, **options).prev_sample
        return z

    def guided(self, output: Tensor, z: Tensor, t: Tensor, centroids: Tensor, how: Sampling) -> Tensor:
        """The network's output at z and t, as if the clean latent it sees were nearer to the centroid.

        While sigma_t > guide_until: clean <- clean + guide_scale * coarse(centroid - clean), `coarse` being the means
        of squares of `guide_pool` pixels. Then the model is let go, and makes an image of the mode it is in.

        Source: mode guidance and its stop are those of Chan-Santiago et al., MGD3, ICML 2025 (arXiv 2505.18963).
        Differences: there the modes are k-means centres and the pull is a gradient step of its own on the noisy latent;
        here centroids and weights are the quantizer's, the pull is a convex step of the clean estimate, which no scale
        can overshoot, and it may be of the coarse part alone.
        """
        channels = z.shape[1]
        level = self.scheduler.alphas_cumprod.to(self.device)[t.long().to(self.device)]
        signal, sigma = level.sqrt(), (1 - level).sqrt()
        if float(sigma) <= how.guide_until:
            return output
        prediction, rest = output[:, :channels], output[:, channels:]
        # eps = (z - signal clean) / sigma; v = signal eps - sigma clean = (signal z - clean) / sigma. A shift of the
        # clean latent moves them by -signal / sigma and -1 / sigma times as much.
        v = self.scheduler.config.get("prediction_type", "epsilon") == "v_prediction"
        clean = signal * z - sigma * prediction if v else (z - sigma * prediction) / signal.clamp_min(1e-4)
        shift = how.guide_scale * _coarse(centroids - clean, how.guide_pool)
        moved = prediction - (shift / sigma if v else shift * signal / sigma)
        return torch.cat([moved, rest], dim=1)

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
            else:  # v_prediction: there is no third that `_check_clean` lets through
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
        return self.sampler.tried(how)

    def _check_guidance(self, how: Sampling) -> None:
        if how.guidance != 1.0 and not self.has_null:
            raise ValueError(
                f"prior: guidance {how.guidance} needs a null label, which this model lacks; use guidance=1"
            )


def _check_guide(how: Sampling) -> None:
    if not (0 <= how.guide_until <= 1 and 0 <= how.guide_scale <= 1 and how.guide_pool >= 1):
        raise ValueError(
            "prior: expected guide_until and guide_scale in [0, 1] and guide_pool of 1 or more, got "
            f"{how.guide_until}, {how.guide_scale} and {how.guide_pool}"
        )


def _coarse(x: Tensor, side: int) -> Tensor:
    """x [B, C, h, w] with each square of `side` pixels replaced by its mean; squares at the edges may be smaller."""
    if side == 1:
        return x
    means = nn.functional.avg_pool2d(x, side, ceil_mode=True, count_include_pad=False)
    wide = means.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
    return wide[..., : x.shape[2], : x.shape[3]]


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
