"""Which cluster a run joins, where its address came from, and whether a Ray head answers there."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

PROBE_SECONDS = 10.0
# The opening of HTTP/2, which every gRPC server answers with settings of its own, and nothing else does.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@dataclass(frozen=True)
class Where:
    """A cluster's address, HOST:PORT, and who gave it."""

    address: str
    source: str


def find(asked: str | None, environment: Mapping[str, str]) -> Where | None:
    """The cluster to join; None for a Ray of the run's own.

    Args:
        asked: cluster.address: local, auto, HOST:PORT, or None where it is not given.

    Raises:
        ValueError: When the address is of a kind that a run cannot join, or none is found.
    """
    given = environment.get("RAY_ADDRESS", "").strip()
    if asked == "local":
        return None
    if asked not in (None, "auto"):
        return _checked(str(asked), "cluster.address")
    if given and given not in ("auto", "local"):
        return _checked(given, "RAY_ADDRESS")
    if given == "local" or (asked is None and not given):
        return None
    source = "RAY_ADDRESS=auto" if given else "cluster.address=auto"
    return _running(source)


def _running(source: str) -> Where:
    """The cluster that `ray start` left word of on this machine."""
    from ray._private import services, utils

    noted = utils.read_ray_address()
    if noted:
        return _checked(noted, f"{source}, from Ray's own {utils.get_ray_address_file(None)}")
    found = sorted(services.find_gcs_addresses())
    if not found:
        raise ValueError(
            f"{source}, but no Ray runs on this machine: start one (ray start --head), submit the command to a cluster "
            "(ray job submit), set RAY_ADDRESS=HOST:PORT, or set cluster.address=local"
        )
    if len(found) > 1:
        raise ValueError(f"{source}, but several Rays run on this machine: set cluster.address to one of {found}")
    return Where(found[0], f"{source}, the one that runs on this machine")


def _checked(address: str, source: str) -> Where:
    if address.startswith("ray://"):
        host = re.sub(r":\d+$", "", address.removeprefix("ray://"))
        raise ValueError(
            f"{source}={address}: a run cannot go through Ray Client. Submit it (ray job submit --address "
            f"http://{host}:8265 ...), or run it on a node of the cluster with RAY_ADDRESS={host}:6379"
        )
    if re.match(r"https?://", address):
        raise ValueError(
            f"{source}={address} is the address for submitting jobs: use `ray job submit --address {address} ...`, or "
            "unset it (cluster.address=local starts a Ray of this run's own)"
        )
    if not re.fullmatch(r"(\[[^\]]+\]|[^:/\s]+):\d{1,5}", address):
        raise ValueError(f"{source}={address}: expected HOST:PORT, as `ray start` prints it, or local or auto")
    return Where(address, source)


def probe(where: Where, seconds: float = PROBE_SECONDS) -> None:
    """See within `seconds` that a gRPC server answers there: Ray itself would be silent for minutes.

    Raises:
        ValueError: When nothing does.
    """
    host, _, port = where.address.rpartition(":")
    way = f"start it, mend the address ({where.source}), or set cluster.address=local for a Ray of this run's own"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as s:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return  # it would take the plain hello for nonsense
            s.settimeout(seconds)
            s.sendall(_HELLO)
            answer = s.recv(9)
    except (OSError, OverflowError) as error:
        reason = f"no answer in {seconds:.0f} s" if isinstance(error, TimeoutError) else str(error)
        raise ValueError(f"no Ray cluster at {where.address} ({where.source}): {reason}; {way}") from None
    if len(answer) < 4 or answer[3] != 4:  # not a SETTINGS frame
        raise ValueError(
            f"what answers at {where.address} ({where.source}) is no Ray head: expected the port that `ray start "
            f"--head` prints (6379 by default); {way}"
        )
