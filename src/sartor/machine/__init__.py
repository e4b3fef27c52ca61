"""What the job runs on: devices, memory and cores, as this process may use them; their rates, measured or published."""

from sartor.machine.calibration import Calibration, find_calibration, load_calibration
from sartor.machine.memory import HostMemory, host_memory
from sartor.machine.probe import Device, Machine, machine_of, probe

__all__ = [
    "Calibration",
    "Device",
    "HostMemory",
    "Machine",
    "find_calibration",
    "host_memory",
    "load_calibration",
    "machine_of",
    "probe",
]
