"""What the job runs on: devices, memory and cores, as this process may use them."""

from sartor.machine.memory import HostMemory, host_memory
from sartor.machine.probe import Device, Machine, probe

__all__ = ["Device", "HostMemory", "Machine", "host_memory", "probe"]
