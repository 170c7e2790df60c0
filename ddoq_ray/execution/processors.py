"""Arithmetic that a processor has no units for: said before time is spent on it."""

from __future__ import annotations

import platform
from collections.abc import Iterable

import ray

from ddoq_ray.config.cluster import TrainerResources
from ddoq_ray.execution.console import say
from ddoq_ray.execution.places import each_node
from ddoq_ray.execution.session import may_grow
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact


def bfloat16_words(amx: bool, avx512_bf16: bool, channels_last: bool) -> str:
    """What is known of training in bfloat16 beside float32 on an x86 processor; empty where it is the faster one.

    >>> bfloat16_words(True, True, True), bfloat16_words(False, True, False)
    ('', '')
    >>> bfloat16_words(False, False, False)
    'a processor without AMX or AVX512-BF16, where bfloat16 is 1.1 to 4.5 times slower than float32'
    >>> bfloat16_words(False, True, True)
    'a processor without AMX, where bfloat16 in channels_last takes 0.5 to 4 times as long as float32'
    """
    if amx or (avx512_bf16 and not channels_last):
        return ""
    if avx512_bf16:
        return "a processor without AMX, where bfloat16 in channels_last takes 0.5 to 4 times as long as float32"
    return "a processor without AMX or AVX512-BF16, where bfloat16 is 1.1 to 4.5 times slower than float32"


def slow_bfloat16(channels_last: bool) -> str:
    """`bfloat16_words` of this machine; empty for a processor of another kind, of which nothing is known."""
    import torch  # not for whoever trains in float32

    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    has = (torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported())
    return bfloat16_words(*has, channels_last)


def say_slow_bfloat16(trainer: TrainerResources, students: Iterable[Artifact]) -> None:
    """One line where students are yet to be trained in bfloat16 on processors that are slower at it."""
    if trainer.precision != "bfloat16" or trainer.num_gpus:
        return
    if all(student.folder.exists(layout.MANIFEST) for student in students):
        return
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    if may_grow():
        found = [words for _, words in each_node(nodes, slow_bfloat16, trainer.channels_last) if words]
    else:  # this machine is all there is
        found = [words] if (words := slow_bfloat16(trainer.channels_last)) else []
    if found:
        more = f" ({len(found)} of {len(nodes)} nodes)" if len(nodes) > 1 else ""
        say(f"train      cluster.trainer.precision=bfloat16 on {found[0]}{more}")
