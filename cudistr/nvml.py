"""What NVML says of a GPU: its clock, its power, and whether power holds the clock down. Needs nvidia-ml-py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cudistr.errors import CudaUnavailableError

__all__ = ["Meter", "Reading"]


@dataclass(frozen=True)
class Reading:
    """One moment."""

    mhz: float  # of the multiprocessors
    watts: float  # of the board; from Ampere on, but for A100, an average over the second before
    limited: bool  # whether power holds the clock down


class Meter:
    """NVML's view of one GPU.

    Parameters
    ----------
    bus_id : str
        On the PCI bus. An index would not do: NVML counts all GPUs, CUDA those of CUDA_VISIBLE_DEVICES.

    Raises
    ------
    ImportError
        Without the package nvidia-ml-py.
    CudaUnavailableError
        If NVML cannot say what is asked; so does :meth:`read`.
    """

    def __init__(self, bus_id: str) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise ImportError(
                "clock and power are read with the package nvidia-ml-py, whose module pynvml cannot be imported",
                name="pynvml",
            ) from error
        self._nvml, self._bus_id = pynvml, bus_id
        # The brake is pulled from outside, by a power supply for instance.
        self._power = (
            pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
        )
        self._ask("nvmlInit")
        self._gpu = self._ask("nvmlDeviceGetHandleByPciBusId", bus_id)
        # The limit that is in force now, and the highest clock there is.
        self.limit_watts = self._ask("nvmlDeviceGetEnforcedPowerLimit", self._gpu) / 1e3
        self.max_mhz = float(self._ask("nvmlDeviceGetMaxClockInfo", self._gpu, pynvml.NVML_CLOCK_SM))

    def _ask(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, name)(*arguments)
        except self._nvml.NVMLError as error:
            raise CudaUnavailableError(
                f"clock and power of the GPU {self._bus_id} cannot be read: {name}: {error}. What 'nvidia-smi "
                "--query-gpu=clocks.sm,power.draw,enforced.power.limit --format=csv' does not show cannot be recorded."
            ) from error

    def read(self) -> Reading:
        """What holds at this moment."""
        mhz = self._ask("nvmlDeviceGetClockInfo", self._gpu, self._nvml.NVML_CLOCK_SM)
        watts = self._ask("nvmlDeviceGetPowerUsage", self._gpu) / 1e3
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", self._gpu)
        return Reading(float(mhz), watts, bool(reasons & self._power))
