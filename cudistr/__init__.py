"""cudistr: attention for CuPy arrays, exact and with a reduced score product, without PyTorch."""

from cudistr import reference
from cudistr.api import attention, attention_error, attention_plan, group, merge
from cudistr.errors import CompileError, CudaUnavailableError, UnsupportedDeviceError
from cudistr.projection import Projection
from cudistr.reductions import LSH, Energy, LowRank

__version__ = "0.1.0"

__all__ = [
    "LSH",
    "CompileError",
    "CudaUnavailableError",
    "Energy",
    "LowRank",
    "Projection",
    "UnsupportedDeviceError",
    "__version__",
    "attention",
    "attention_error",
    "attention_plan",
    "group",
    "merge",
    "reference",
]
