"""Exception types of cudistr. Bad arguments raise ``TypeError`` or ``ValueError``; these are the rest."""

from __future__ import annotations

__all__ = ["CompileError", "CudaUnavailableError", "DistributedError", "UnsupportedDeviceError"]


class UnsupportedDeviceError(RuntimeError):
    """The GPU that holds the arrays is older than the kernels need (compute capability 8.0)."""


class CudaUnavailableError(RuntimeError):
    """CuPy, the CUDA driver or NVRTC cannot be used; the message says which, and how to mend it."""


class CompileError(RuntimeError):
    """A kernel did not compile.

    Attributes
    ----------
    log : str
        What the compiler printed.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(f"{message}\n{log}" if log else message)
        self.log = log


class DistributedError(RuntimeError):
    """A process of a group of several did not do its part; the group cannot be used any more.

    Attributes
    ----------
    ranks : tuple of int
        Who did not.
    operation : str
        What was under way.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = (), operation: str = "") -> None:
        super().__init__(message)
        self.ranks, self.operation = ranks, operation
