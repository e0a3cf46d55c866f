"""The memory node of a GPU, as the kernel's files say."""

from __future__ import annotations

from moe_lightning.hardware.numa import gpu_node

ADDRESS = "00000000:65:00.0"


def machine(root, num_nodes, numa_node="1"):
    for node in range(num_nodes):
        (root / f"devices/system/node/node{node}").mkdir(parents=True)
    slot = root / "bus/pci/devices/0000:65:00.0"
    slot.mkdir(parents=True)
    (slot / "numa_node").write_text(numa_node + "\n")
    return root


def test_the_node_is_that_of_the_slot(tmp_path):
    assert gpu_node(ADDRESS, machine(tmp_path, 2)) == 1


def test_one_node_is_no_choice(tmp_path):
    assert gpu_node(ADDRESS, machine(tmp_path, 1, "0")) is None


def test_what_the_system_does_not_say_is_no_node(tmp_path):
    root = machine(tmp_path, 2, "-1")
    assert gpu_node(ADDRESS, root) is None
    assert gpu_node("00000000:66:00.0", root) is None
    assert gpu_node("", root) is None
