"""The catalogue: how names are read, that every entry is sound and has sources, and files of the user's own."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sartor.errors import JobError
from sartor.machine import catalogue as module
from sartor.machine.catalogue import KINDS, DeviceModel, MachineModel, load, lookup
from sartor.machine.catalogue_page import page

ROOT = Path(__file__).parents[2]
YAML = Path(module.__file__).with_name("catalogue.yaml")
DEVICES = list(load().devices.values())
MACHINES = list(load().machines.values())
MINE = """
devices:
  Card-48GB:
    kind: cuda
    vendor_name: Some Card
    memory_bytes: {value: 47GiB, source: measured here}
machines:
  office:
    device: Card-48GB
    devices_per_node: {value: 2, source: ours}
"""


@pytest.fixture(autouse=True)
def _no_file_of_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(module.USER_FILE_VARIABLE, raising=False)


def user_file(folder: Path, text: str = MINE) -> Path:
    path = folder / "machines.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# -- names ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nodes", "per_node", "device"),
    [
        ("L40S-48GB", 1, 1, "L40S-48GB"),
        ("8xA100-80GB", 1, 8, "A100-80GB"),
        ("4x8xH100-80GB", 4, 8, "H100-80GB"),
        ("  2 × 8 * h100 sxm ", 2, 8, "H100-80GB"),
        ("1x1xT4", 1, 1, "T4-16GB"),
        ("A100", 1, 1, "A100-80GB"),
        ("H100_PCIe", 1, 1, "H100-PCIe-80GB"),
        ("4090", 1, 1, "RTX4090-24GB"),
        ("rtx 4090", 1, 1, "RTX4090-24GB"),
        ("2x3090-24GB", 1, 2, "RTX3090-24GB"),
        ("NVIDIA GeForce RTX 4090", 1, 1, "RTX4090-24GB"),
        ("NVIDIA H100 80GB HBM3", 1, 1, "H100-80GB"),
        ("B200-192GB", 1, 1, "B200-180GB"),
        ("MI250X", 1, 2, "MI250X-GCD-64GB"),
        ("2x4xMI250X", 2, 8, "MI250X-GCD-64GB"),
        ("trn1.32xlarge", 1, 32, "Trn1-NeuronCore-16GB"),
        ("4 x TRN1.32XLARGE", 4, 32, "Trn1-NeuronCore-16GB"),
        ("2xp5.48xlarge", 2, 8, "H100-80GB"),
    ],
)
def test_names_and_counts(name: str, nodes: int, per_node: int, device: str) -> None:
    machine = lookup(name)
    assert (machine.nodes, machine.devices_per_node, machine.device.name) == (nodes, per_node, device)
    assert machine.devices == nodes * per_node


@given(nodes=st.integers(1, 999), per_node=st.integers(1, 99), device=st.sampled_from(DEVICES))
def test_a_machine_found_is_found_again_by_its_own_name(nodes: int, per_node: int, device: DeviceModel) -> None:
    machine = lookup(f"{nodes}x{per_node}x{device.name}")
    assert machine == lookup(machine.name)
    assert (machine.nodes, machine.devices_per_node, machine.device) == (nodes, per_node, device)


@given(data=st.data())
def test_case_and_separators_do_not_matter(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*load().devices, *load().machines, *load().aliases]))
    odd = "".join(
        data.draw(st.sampled_from([c.upper(), c.lower()])) + data.draw(st.sampled_from(["", " ", "-", "_"])) for c in name
    )
    assert lookup(odd) == lookup(name)


def test_a_whole_node_brings_host_memory_network_and_its_own_price() -> None:
    one, four = lookup("p5.48xlarge"), lookup("4xp5.48xlarge")
    assert one.host_memory_bytes == 2048 * 2**30
    assert one.network_bytes_per_second == 400 * 10**9
    assert one.price_usd_per_hour is not None
    assert four.price_usd_per_hour == 4 * one.price_usd_per_hour
    assert dataclasses.replace(four, nodes=1, name=one.name) == one


def test_devices_are_priced_one_by_one() -> None:
    single = lookup("H100").price_usd_per_hour
    assert single is not None
    assert lookup("2x8xH100").price_usd_per_hour == pytest.approx(16 * single)
    assert lookup("8xMI250X").price_usd_per_hour is None


@pytest.mark.parametrize(
    ("name", "near"),
    [("8xA100-81GB", "A100-80GB"), ("RTX4099", "RTX4090"), ("p5.49xlarge", "p5.48xlarge"), ("Gaudi 4", "Gaudi3"), ("", "8xA100")],
)
def test_unknown_names_get_the_nearest_known(name: str, near: str) -> None:
    with pytest.raises(JobError) as caught:
        lookup(name)
    assert near in caught.value.remedy


@pytest.mark.parametrize("name", ["0xA100", "2x0xA100", "2x2xp5.48xlarge", "2x2x2xA100", "8x", "x", "-1xA100"])
def test_counts_that_make_no_sense(name: str) -> None:
    with pytest.raises(JobError):
        lookup(name)


# -- entries -------------------------------------------------------------------------------------------------------------------


def test_the_file_says_nothing_twice() -> None:
    names = re.findall(r"^  (\S.*?):(?: |$)", YAML.read_text(encoding="utf-8").split("\ndevices:")[1], re.MULTILINE)
    assert len(names) == len(set(names)) == len(DEVICES) + len(MACHINES) + len(load().aliases)


@pytest.mark.parametrize("model", [*DEVICES, *MACHINES], ids=lambda model: model.name)
def test_every_figure_has_a_source(model: DeviceModel | MachineModel) -> None:
    figures = {
        field.name
        for field in dataclasses.fields(model)
        if re.search("bytes|flops|efficiency|sm$|watts|price_usd|devices_per_node", field.name)
        and getattr(model, field.name) not in (None, {})
    }
    assert set(model.sources) == figures
    assert all(len(source.title) > 8 and "://" not in source.title for source in model.sources.values())


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_device_figures_are_plausible(device: DeviceModel) -> None:
    within = {
        "memory_bytes": (4 * 2**30, 512 * 2**30),
        "memory_bandwidth_bytes_per_second": (50e9, 20e12),
        "host_memory_bandwidth_bytes_per_second": (20e9, 2e12),
        "host_link_bytes_per_second": (4e9, 500e9),
        "peer_link_bytes_per_second": (10e9, 2e12),
        "matmul_efficiency": (0.4, 1),
        "training_efficiency": (0.2, 0.8),
        "sm": (70, 130),
        "tdp_watts": (30, 1500),
        "price_usd_per_hour": (0.02, 50),
    }
    for name, (least, most) in within.items():
        value = getattr(device, name)
        assert value is None or least <= value <= most, name
    assert device.kind in KINDS
    if device.matmul_efficiency and device.training_efficiency:
        assert device.training_efficiency < device.matmul_efficiency
    assert (device.sm is not None) == (device.kind == "cuda")
    rates = device.peak_flops_per_second
    assert all(1e12 <= rate <= 10e15 for rate in rates.values())
    for slow, fast in (("float32", "tf32"), ("tf32", "bfloat16"), ("bfloat16", "float16"), ("float16", "fp8"), ("fp8", "int8")):
        assert rates.get(slow, 0) <= rates.get(fast, float("inf")), (slow, fast)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_memory_fits_the_size_in_the_name(device: DeviceModel) -> None:
    sold = re.search(r"(\d+)GB$", device.name)
    if sold:
        assert 0.9 <= device.memory_bytes / (int(sold[1]) * 2**30) <= 1


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_machine_figures_are_plausible(machine: MachineModel) -> None:
    assert 1 <= machine.devices_per_node <= 64
    assert machine.devices_per_node % machine.device.devices_per_package == 0
    assert machine.host_memory_bytes is None or 8 * 2**30 <= machine.host_memory_bytes <= 8 * 2**40
    assert machine.network_bytes_per_second is None or 1e9 <= machine.network_bytes_per_second <= 1e12
    price = machine.node_price_usd_per_hour
    assert price is None or 0.1 <= price / machine.devices_per_node <= 20


def test_prices_have_a_date() -> None:
    for model in [*DEVICES, *MACHINES]:
        price = model.price_usd_per_hour
        assert (price is None) == (model.price_date is None)
        assert model.price_date is None or re.fullmatch(r"20\d\d-\d\d(-\d\d)?", model.price_date)


def test_published_totals() -> None:
    """Totals that other people's programs have printed for these devices, to two decimals of a GiB."""
    totals = {"H100": 79.11, "A100-40GB": 39.49, "H200": 139.8, "T4": 14.56, "L4": 22.03, "V100-32GB": 31.73}
    assert {name: round(lookup(name).device.memory_bytes / 2**30, 2) for name in totals} == totals


# -- files of the user's own ---------------------------------------------------------------------------------------------------


def test_a_file_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = user_file(tmp_path)
    assert lookup("4xoffice", user_file=path).devices == 8
    assert lookup("some card", user_file=path).device.memory_bytes == 47 * 2**30
    assert lookup("8xA100", user_file=path) == lookup("8xA100")
    with pytest.raises(JobError):
        lookup("office")
    monkeypatch.setenv(module.USER_FILE_VARIABLE, str(path))
    assert lookup("office").device.sources["memory_bytes"].title == "measured here"


def test_a_file_wins(tmp_path: Path) -> None:
    path = user_file(tmp_path, MINE.replace("Card-48GB", "H100-80GB") + "aliases: {A100: L4-24GB, box: 2xT4}\n")
    assert lookup("h100 sxm", user_file=path).device.vendor_name == "Some Card"
    assert lookup("p5.48xlarge", user_file=path).device.vendor_name == "Some Card"
    assert lookup("8xA100", user_file=path).device.name == "L4-24GB"
    assert lookup("A100-80GB", user_file=path).device.name == "A100-80GB"
    assert lookup("3x2xbox", user_file=path).devices == 12
    path = user_file(tmp_path, "aliases: {A100-80GB: L4-24GB}\n")
    assert lookup("A100", user_file=path).device.name == "L4-24GB"


def test_a_name_of_the_file_wins_over_a_built_in_alias(tmp_path: Path) -> None:
    path = user_file(tmp_path, MINE.replace("Card-48GB", "H100"))
    assert lookup("2xh100", user_file=path).device.vendor_name == "Some Card"
    assert lookup("H100-80GB", user_file=path).device.vendor_name == "NVIDIA H100 80GB HBM3"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load(user_file(tmp_path, "")) == load()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    kind: cuda\n", "", "devices: Card-48GB: `kind` is missing"),
        ("kind: cuda", "kind: gpu", "devices: Card-48GB: kind 'gpu'"),
        ("vendor_name: Some Card", "vendor_name: 7", "`vendor_name` should be a str"),
        ("    memory_bytes: {value: 47GiB, source: measured here}\n", "", "`memory_bytes` is missing"),
        (", source: measured here", "", "devices: Card-48GB: memory_bytes: `source` is missing"),
        (", source: measured here", ", source: ''", "`source` should be"),
        ("value: 47GiB, ", "", "memory_bytes: `value` is missing"),
        ("47GiB", "much", "memory_bytes: 'much' is not right"),
        ("47GiB", "0", "memory_bytes: 0 is not right"),
        ("{value: 47GiB, source: measured here}", "47GiB", "memory_bytes: should be a mapping"),
        ("source: measured here", "source: here, verified: maybe", "`verified` should be a bool"),
        ("vendor_name", "vender_name", "unknown field 'vender_name'"),
        ("{value: 2,", "{value: true,", "devices_per_node: True is not right"),
        ("device: Card-48GB", "device: Card-49GB", "machines: office: device 'Card-49GB' is not known"),
        ("machines:", "machine:", "unknown field 'machine'"),
        ("  office:", "  card 48gb:", "cannot be told from"),
        ("kind: cuda", "kind: cuda\n    sm: {value: 8.6, source: ours}", "sm: 8.6 is not right"),
        ("kind: cuda", "kind: cuda\n    matmul_efficiency: {value: 80, source: ours}", "not a share"),
        ("kind: cuda", "kind: cuda\n    price_usd_per_hour: {value: 1, source: ours}", "needs the `date`"),
        ("kind: cuda", "kind: cuda\n    peak_flops_per_second: {value: {bf16: 1T}, source: ours}", "bf16: 1T"),
        ("kind: cuda", "kind: cuda\n    peak_flops_per_second: {value: {float32: 1e12}, source: ours}", "should be like"),
    ],
)
def test_a_file_that_is_not_right_is_named_with_the_entry(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in MINE
    path = user_file(tmp_path, MINE.replace(old, new, 1))
    with pytest.raises(JobError) as caught:
        load(path)
    assert str(path) in caught.value.what
    assert says in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize(
    "text", ["aliases: {a: b}", "aliases: {a: 2x2x2xA100}", "aliases: {a: 2x2xA100}", "aliases: {a: b, b: 2xa}"]
)
def test_aliases_stand_for_what_there_is(tmp_path: Path, text: str) -> None:
    with pytest.raises(JobError):
        load(user_file(tmp_path, text))


@pytest.mark.parametrize("text", ["- a\n- b", "devices: [1]", "7: 8", "a: [", "\tx"])
def test_a_file_of_another_shape(tmp_path: Path, text: str) -> None:
    with pytest.raises(JobError):
        load(user_file(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be read"):
        load(tmp_path / "none.yaml")


# -- the page ------------------------------------------------------------------------------------------------------------------


def test_the_page_is_up_to_date() -> None:
    written = (ROOT / "docs/machines.md").read_text(encoding="utf-8")
    assert written == page(), "python -m sartor.machine.catalogue > docs/machines.md"


def test_the_example_of_the_page_works(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", page(), re.DOTALL)
    assert example
    path = user_file(tmp_path, example[1])
    mine = load(path)
    assert lookup("2xoffice", user_file=path).devices == 4
    for name in [*yaml.safe_load(example[1])["devices"], "big card"]:
        assert isinstance(mine.find(name), DeviceModel | str)


def test_the_page_names_everything() -> None:
    text = page()
    for name in [*load().devices, *load().machines, *load().aliases]:
        assert f"`{name}`" in text
