"""ddoq_ray: distil huge labelled image datasets into small weighted synthetic ones, on Ray.

>>> import ddoq_ray
>>> sorted(ddoq_ray.__all__)
['Codebook', 'DistilledDataset', '__version__', 'distill', 'load']
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Codebook", "DistilledDataset", "__version__", "distill", "load"]

# Lazy (PEP 562), so that `import ddoq_ray.core` on a bare GPU machine does not drag Ray in.
_PLACES = {
    "Codebook": "ddoq_ray.storage.records",
    "DistilledDataset": "ddoq_ray.data.image_set",
    "distill": "ddoq_ray.pipeline",
    "load": "ddoq_ray.data.loading",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'ddoq_ray' has no attribute {name!r}")
