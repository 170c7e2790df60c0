"""What each stage holds of the cluster at the same time, at least: a table made of the steps.

Ray lets what does not fit wait for ever. So before work starts the table is laid beside the nodes: a pool that has a
range or a count is made smaller on this machine's own Ray, and what cannot fit is refused with the key to change; on a
cluster, which may grow, it is said what will be waited for. Nothing here changes a byte of any output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ddoq_ray.config import RunConfig
from ddoq_ray.stages.step import Ask, Step

WHOLE = ("quantizer.num_shards", "cluster.trainer.groups")  # pools of so many times their least
UNITS = {"CPU": "CPU", "GPU": "GPU", "memory": "GiB of memory"}

Room = Mapping[str, float]  # what a node has, by Ray's names: CPU, GPU, memory (bytes)


def table(config: RunConfig, steps: Sequence[Step]) -> dict[str, list[Ask]]:
    """Name of a step -> what it holds at the same time, of the steps that the run wants."""
    found: dict[str, list[Ask]] = {}
    for step in steps:
        if not step.wanted(config):
            continue
        asks = step.asks(config)
        there = found.get(step.name)
        if there is None:
            found[step.name] = asks
        elif step.at_once:
            found[step.name] = [
                replace(a, count=a.count + b.count, least=a.least + b.least) for a, b in zip(there, asks, strict=True)
            ]
        else:  # they take turns: what asks for most must fit
            found[step.name] = max(there, asks, key=_demanded)
    if "encode" in found and "quantize" in found:
        found["encode"] += found.pop("quantize")  # they take the latents while encoders write them
    return {name: asks for name, asks in found.items() if asks}


def _demanded(asks: Sequence[Ask]) -> tuple[float, ...]:
    return tuple(sum(a.count * a.room[name] for a in asks) for name in ("GPU", "CPU", "memory"))


def fits(asks: Iterable[Ask], nodes: Sequence[Room]) -> bool:
    """Whether all workers find room at once; the largest are placed first, GPUs before CPUs."""
    free = [dict(node) for node in nodes]
    for ask in sorted(asks, key=lambda a: (a.gpus, a.cpus, a.memory), reverse=True):
        at = 0
        for _ in range(ask.count):
            while at < len(free) and not _has(free[at], ask.room):
                at += 1
            if at == len(free):
                return False
            for name, amount in ask.room.items():
                free[at][name] = free[at].get(name, 0.0) - amount
    return True


def _has(node: Room, room: Room) -> bool:
    return all(amount <= node.get(name, 0.0) + 1e-6 for name, amount in room.items() if amount)


def fitted(asks: Sequence[Ask], nodes: Sequence[Room]) -> list[Ask] | None:
    """The largest pools that fit, the first ask shrunk last; None when not even the least do."""
    now = [replace(ask, count=ask.least) for ask in asks]
    if not fits(now, nodes):
        return None
    for i in reversed(range(len(asks))):
        low, high = now[i].count, asks[i].count
        step = low if asks[i].pool in WHOLE else 1  # as many for each codebook, or for each group of students
        while low < high:
            middle = low + step * max(1, (high - low + step - 1) // (2 * step))
            if fits([*now[:i], replace(asks[i], count=middle), *now[i + 1 :]], nodes):
                low = middle
            else:
                high = middle - step
        now[i] = replace(now[i], count=low)
    return now


def shrink(config: RunConfig, asks: Sequence[Ask]) -> tuple[RunConfig, list[str]]:
    """The configuration with the pools of `asks`, and a line for each that became smaller."""
    words = []
    for ask in asks:
        count, before = ask.count, 0
        if ask.pool == "encoder.workers":
            before = config.encoder.workers
            top = min(config.encoder.max_workers, count) if config.encoder.max_workers else 0
            config = _with(config, "encoder", workers=count, max_workers=top)
        elif ask.pool == "synthesizer.max_workers":
            before = config.synthesizer.max_workers
            low = min(config.synthesizer.min_workers, count)
            config = _with(config, "synthesizer", min_workers=low, max_workers=count)
        elif ask.pool == "labels.workers" and config.labels.stored:
            before = config.labels.workers
            config = _with(config, "labels", workers=count)
        elif ask.pool == "quantizer.num_shards":
            count, before = ask.count // ask.least, config.quantizer.num_shards
            config = _with(config, "quantizer", num_shards=count)
        elif ask.pool == "cluster.trainer.groups":
            trainer = config.cluster.trainer
            count, before = ask.count // ask.least, trainer.groups
            config = _with(config, "cluster", trainer=replace(trainer, groups=count))
        if count < before:
            words.append(f"{ask.pool}={before} has room for {count}")
    return config, words


def _with(config: RunConfig, group: str, **values: object) -> RunConfig:
    made: dict[str, object] = {group: replace(getattr(config, group), **values)}
    return replace(config, **made)  # type: ignore[arg-type]


def misfit(stage: str, asks: Sequence[Ask], nodes: Sequence[Room]) -> str:
    """Why the least demand of a stage does not fit, and which key to change."""
    least = [replace(ask, count=ask.least) for ask in asks]
    needs = " and ".join(f"{a.count} {a.what}{'s' * (a.count > 1)} of {in_words(a.room)}" for a in least)
    together = {name: sum(a.count * a.room[name] for a in least) for name in UNITS}
    have = {name: sum(node.get(name, 0.0) for node in nodes) for name in UNITS}
    scarce = next((n for n in ("GPU", "CPU", "memory") if together[n] > have[n] + 1e-6), None)
    alone = next((a for a in least if not any(_has(node, a.room) for node in nodes)), None)
    if scarce is not None:
        there = f"there are {in_words({scarce: have[scarce]})} in all"
        causes = [a for a in least if a.room[scarce]]
    elif alone is not None:
        there = f"no single node has {in_words(alone.room)} ({_nodes(nodes)})"
        causes, scarce = [alone], "GPU" if alone.gpus else "CPU"
    else:
        there, causes, scarce = f"they do not fit side by side on {_nodes(nodes)}", least, "CPU"
    return f"{stage} needs at the same time {needs}; {there}; {_change(causes, scarce)}"


def _change(causes: Sequence[Ask], scarce: str) -> str:
    few = {"cluster.trainer.groups": "cluster.trainer.workers"}  # of one group, the least there is
    keys = [few.get(a.pool, a.pool) for a in causes if a.pool and a.least > 1 and a.pool != "quantizer.num_shards"]
    if scarce != "memory":
        keys += [f"{a.key}.num_{scarce.lower()}s" for a in causes if a.key and a.room[scarce]]
    way = f"lower {' or '.join(dict.fromkeys(keys))}" if keys else "use a larger machine"
    if scarce == "CPU":
        way += ", or raise cluster.num_cpus"
    if any(a.pool == "quantizer.num_shards" for a in causes):
        way += ", or quantize in a run of its own (stages=[prepare,encode], then stages=[quantize])"
    return way


def _nodes(nodes: Sequence[Room]) -> str:
    shown = ", ".join(in_words({"CPU": n.get("CPU", 0.0), "GPU": n.get("GPU", 0.0)}) for n in nodes[:4])
    return f"{len(nodes)} node{'s' * (len(nodes) != 1)}: {shown}{', ...' if len(nodes) > 4 else ''}"


def in_words(room: Room) -> str:
    """Resources in words: 0.5 CPU and 1 GPU."""
    scaled = {name: amount / 2**30 if name == "memory" else amount for name, amount in room.items()}
    some = {n: a for n, a in scaled.items() if a} or {next(iter(room)): 0.0}
    return " and ".join(f"{round(a, 2):g} {UNITS.get(n, n)}" for n, a in some.items())


def plan(
    config: RunConfig, steps: Sequence[Step], nodes: Sequence[Room], *, may_grow: bool
) -> tuple[RunConfig, list[str]]:
    """The configuration whose pools fit these nodes, and lines to say.

    Args:
        may_grow: On a cluster nothing is made smaller or refused: nodes may join, and a pending worker is the demand
            that an autoscaler sees.

    Raises:
        ValueError: When a stage cannot fit, naming it, what it needs, what there is, and the key to change.
    """
    words: list[str] = []
    refused: list[str] = []
    for stage, asks in table(config, steps).items():
        if fits(asks, nodes):
            continue
        pools = fitted(asks, nodes)
        if pools is None:
            refused.append(misfit(stage, asks, nodes))
        elif not may_grow:
            config, told = shrink(config, pools)
            words += [f"{stage:<10} {t} on {_nodes(nodes)}; that many are started" for t in told]
    if refused and not may_grow:
        raise ValueError("; ".join(refused))
    words += [f"waiting    {text}: it will wait until nodes join" for text in refused]
    return config, words
