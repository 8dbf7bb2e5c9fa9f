"""Fast weight normalization for PyTorch: standard (w = g v/|v|) and exponential (w = e^alpha v/|v|)."""

import torch  # first: wnkernels._C links against the libraries that it loads

__version__ = "0.1.0"

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "wnkernels._C is missing, or was built against another torch than the one installed here "
        f"({torch.__version__}): run `pip install --no-build-isolation .` in the source tree."
    ) from error

from . import functional, nn, optim, parametrize, reference  # noqa: E402
from .foreach import foreach_weight_norm  # noqa: E402
from .parametrize import convert, fold, unfold, weight_norm  # noqa: E402

__all__ = ["convert", "fold", "foreach_weight_norm", "functional", "nn", "optim", "parametrize", "reference", "unfold",
           "weight_norm"]
