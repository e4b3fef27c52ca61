"""The page docs/machines.md: names, how to add to them, and the catalogue as tables."""

from __future__ import annotations

from sartor.machine.catalogue import Catalogue, DeviceModel, MachineModel, load

_HEAD = """# Machines by name

A forecast needs no machine, only what is known of one. This page is the catalogue; it is printed from
`src/sartor/machine/catalogue.yaml` by `python -m sartor.machine.catalogue > docs/machines.md`.

## Names

| written | is |
|---|---|
| `L40S-48GB` | one device |
| `8xA100-80GB` | one node with eight of them |
| `4x8xH100-80GB` | four such nodes |
| `trn1.32xlarge` | a machine of the second table |
| `4xp5.48xlarge` | four of them |
| `H100`, `4090`, `h100 sxm`, `NVIDIA H100 80GB HBM3` | aliases, and the names torch gives; case and separators do not matter |

A device is what one process drives: a NeuronCore, not a Trainium chip; one die of an MI250X, not the card (`8xMI250X` is eight
cards, so sixteen devices).

## Your own

A file of the same shape adds to the catalogue and wins over it: name it in `$SARTOR_MACHINES`. Sizes are written `23.5GiB`,
links `31.5GB/s`, rates `165.2T`. Every figure says where it comes from; figures you do not know are left out.

```yaml
devices:
  RTX4090-48GB:
    kind: cuda                    # or hip, hpu, neuron, cpu, mps
    vendor_name: NVIDIA GeForce RTX 4090 48GB
    memory_bytes: {value: 47.3GiB, source: torch.cuda.mem_get_info on our machine}
    memory_bandwidth_bytes_per_second: {value: 1008GB/s, source: as the card with 24 GB, verified: false}
    peak_flops_per_second: {value: {float32: 82.6T, bfloat16: 165.2T}, source: as the card with 24 GB}
    host_link_bytes_per_second: {value: 25GB/s, source: measured}
    price_usd_per_hour: {value: 0.6, date: 2026-11-01, source: our cost centre}
machines:
  office:
    device: RTX4090-48GB
    devices_per_node: {value: 2, source: our machine}
    host_memory_bytes: {value: 128GiB, source: our machine}
    network_bytes_per_second: {value: 1.25GB/s, source: our machine}
aliases:
  big-card: RTX4090-48GB
```

Further fields: of a device `peer_link_bytes_per_second`, `host_memory_bandwidth_bytes_per_second`, `matmul_efficiency` and
`training_efficiency` (shares, such as 0.8), `sm`, `tdp_watts`,
`devices_per_package`, `unified_memory`, `note`; `nominal: true` beside a memory's value says that it is the size as sold. Of a
machine `node_price_usd_per_hour` and `note`.
"""

_DEVICES = """## Devices

Memory is the total a process sees (`~`: as sold, no such total is known). Rates are dense, in TFLOP/s, accumulating in float32.
Links are one direction, all links of a device together. Prices are on demand. `matmul` is the share of the
bfloat16 peak that the best large product was measured to reach, `training` the share that published training runs reached, with
recomputation counted as work (the median where a source has several runs). `*`: from the vendor's document, but no page with
the figure was at hand when it was entered. Empty: not published, or the device does not have it.

| name | kind | memory GiB | GB/s | float32 | tf32 | bfloat16 | float16 | fp8 | int8 \
| host GB/s | peer GB/s | matmul | training | sm | W | USD/h | |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|
"""

_MACHINES = """## Machines

| name | devices | host memory GiB | network GB/s | USD/h | |
|---|---|--:|--:|--:|---|
"""


def page(catalogue: Catalogue | None = None) -> str:
    """The whole page, Markdown."""
    catalogue = catalogue or load()
    parts = [_HEAD, _DEVICES + "\n".join(_device_row(device) for device in catalogue.devices.values()) + "\n"]
    parts += [_MACHINES + "\n".join(_machine_row(machine) for machine in catalogue.machines.values()) + "\n"]
    aliases = "\n".join(f"| `{target}` | {names} |" for target, names in _by_target(catalogue).items())
    parts += [f"## Aliases\n\n| name | also |\n|---|---|\n{aliases}\n"]
    parts += ["## Sources\n\n" + "\n".join(f"- {title}" for title in _titles(catalogue)) + "\n"]
    return "\n".join(parts)


def _device_row(device: DeviceModel) -> str:
    rates = {dtype: f"{rate / 1e12:g}" for dtype, rate in device.peak_flops_per_second.items()}
    dtypes = ("float32", "tf32", "bfloat16", "float16", "fp8", "int8")
    cells = [
        f"`{device.name}`",
        device.kind,
        f"{'~' * device.memory_is_nominal}{device.memory_bytes / 2**30:.4g}" + _star(device, "memory_bytes"),
        _giga(device, "memory_bandwidth_bytes_per_second"),
        *(rates[dtype] + _star(device, "peak_flops_per_second") if dtype in rates else "" for dtype in dtypes),
        _giga(device, "host_link_bytes_per_second"),
        _giga(device, "peer_link_bytes_per_second"),
        _percent(device, "matmul_efficiency"),
        _percent(device, "training_efficiency"),
        _plain(device, "sm"),
        _plain(device, "tdp_watts"),
        _price(device, "price_usd_per_hour"),
        device.note,
    ]
    return f"| {' | '.join(cells)} |"


def _machine_row(machine: MachineModel) -> str:
    memory = machine.host_memory_bytes
    cells = [
        f"`{machine.name}`",
        f"{machine.devices_per_node} x `{machine.device.name}`" + _star(machine, "devices_per_node"),
        "" if memory is None else f"{memory / 2**30:g}" + _star(machine, "host_memory_bytes"),
        _giga(machine, "network_bytes_per_second"),
        _price(machine, "node_price_usd_per_hour"),
        machine.note,
    ]
    return f"| {' | '.join(cells)} |"


def _star(model: DeviceModel | MachineModel, name: str) -> str:
    return "" if model.sources[name].verified else "*"


def _plain(model: DeviceModel | MachineModel, name: str, scale: float = 1) -> str:
    value = getattr(model, name)
    return "" if value is None else f"{value / scale:g}" + _star(model, name)


def _giga(model: DeviceModel | MachineModel, name: str) -> str:
    return _plain(model, name, 1e9)


def _percent(device: DeviceModel, name: str) -> str:
    value = getattr(device, name)
    return "" if value is None else f"{100 * value:.0f} %" + _star(device, name)


def _price(model: DeviceModel | MachineModel, name: str) -> str:
    text = _plain(model, name)
    return f"{text} ({model.price_date})" if text else ""


def _by_target(catalogue: Catalogue) -> dict[str, str]:
    targets: dict[str, list[str]] = {}
    for name, target in catalogue.aliases.items():
        targets.setdefault(target, []).append(f"`{name}`")
    return {target: ", ".join(names) for target, names in targets.items()}


def _titles(catalogue: Catalogue) -> list[str]:
    models: list[DeviceModel | MachineModel] = [*catalogue.devices.values(), *catalogue.machines.values()]
    return sorted({source.title for model in models for source in model.sources.values()}, key=str.casefold)
