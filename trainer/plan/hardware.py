"""GPUs and their links, from the vendors' data sheets. All figures are peaks, and per direction where there are two."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight."""

    name: str
    memory_bytes: float  # what a process can use, about 96 % of the label: context, ECC, allocator
    peak_flops: float  # dense bf16 or fp16, a second
    memory_bandwidth: float  # bytes a second
    node_bandwidth: float  # bytes a second to the other GPUs of the node, per direction
    network_bandwidth: float  # bytes a second of this GPU's share of the node's network, per direction; the usual one
    watts: float  # board power


GIB = 2.0**30
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 38.0 * GIB, 312e12, 1.555e12, 300e9, 25e9, 400),
        Gpu("a100-80gb", 77.0 * GIB, 312e12, 2.039e12, 300e9, 25e9, 400),
        Gpu("h100-80gb", 77.0 * GIB, 989e12, 3.35e12, 450e9, 50e9, 700),
        Gpu("h200-141gb", 138.0 * GIB, 989e12, 4.8e12, 450e9, 50e9, 700),
        Gpu("b200-180gb", 174.0 * GIB, 2250e12, 8.0e12, 900e9, 50e9, 1000),
        Gpu("l40s-48gb", 44.0 * GIB, 362e12, 0.864e12, 32e9, 12.5e9, 350),
    )
}


def gpu_named(text: str) -> Gpu | None:
    """The entry for a name as `torch.cuda.get_device_name` writes it, None if there is none."""
    words = text.lower().replace("-", " ").split()
    found = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words]
    sized = [gpu for gpu in found if any(gpu.name.split("-")[1] == word for word in words)]
    return (sized or found or [None])[0]
