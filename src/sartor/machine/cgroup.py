"""What control groups leave this process of memory and processors: version 2, version 1, and both mounted side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sartor.machine.topology import ROOT, read_number, read_text

_MOUNT = Path("sys/fs/cgroup")
_NO_LIMIT = 2**60
"""Version 1 writes a huge number where there is no limit."""


def memory_limits(root: Path = ROOT) -> list[tuple[int, int]]:
    """(limit, used) in bytes of this process's control group and of every group above it; page cache does not count as used."""
    limits = []
    for group in _groups(root, ""):
        limit, used = read_number(group / "memory.max"), read_number(group / "memory.current")
        if limit is not None and used is not None:
            limits.append((limit, max(used - _statistic(group, "inactive_file"), 0)))
    for group in _groups(root, "memory"):
        limit, used = read_number(group / "memory.limit_in_bytes"), read_number(group / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < _NO_LIMIT:
            limits.append((limit, max(used - _statistic(group, "total_inactive_file"), 0)))
    return limits


def processor_limit(root: Path = ROOT) -> float | None:
    """Processors' worth of time that the groups' quotas leave; None without a quota."""
    quotas = []
    for group in _groups(root, ""):
        quota, _, period = read_text(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    for group in _groups(root, "cpu"):
        time, length = read_number(group / "cpu.cfs_quota_us"), read_number(group / "cpu.cfs_period_us")
        if time and length:
            quotas.append(time / length)
    return min(quotas, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's group and of those above it; `controller` is empty for version 2.

    A container may show its own group as the top: folders that are not there are passed over.
    """
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, names, relative = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if controller not in names.split(","):
            continue
        mounts = (
            [root / _MOUNT, root / _MOUNT / "unified"] if not controller else [root / _MOUNT / names, root / _MOUNT / controller]
        )
        for mount in dict.fromkeys(mounts):
            group = mount / relative.strip("/")
            yield from (folder for folder in (group, *group.parents) if folder == mount or mount in folder.parents)


def _statistic(group: Path, name: str) -> int:
    """Page cache that the kernel gives back under pressure."""
    for line in read_text(group / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0
