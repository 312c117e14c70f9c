"""How long a kernel takes on a kind of GPU.

The longest of three times: that of the shortest kernel, its FLOPs at the rate that its shape allows, its bytes at the
memory's bandwidth (the roofline model, Williams et al., Communications of the ACM 52(4), 2009).

No constant was fitted to a training: they are data sheets' and published measurements of kernels.
"""

from collections import Counter
from dataclasses import dataclass
from math import ceil

from train_llava.planning.flops import PEAKS
from train_llava.planning.kernels import Kernel


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. All rates are per second."""

    name: str  # in PEAKS
    memory: float  # GiB that torch finds on it, a little less than on the box
    rate: float  # FLOPs of the best products of bf16 matrices that were published
    attention: float  # share of the peak that FlashAttention-2 reaches
    bandwidth: float  # bytes of its memory, as the data sheet says
    processors: int  # streaming multiprocessors
    link: float  # bytes to the other GPUs of the machine, in one direction, as the data sheet says


# Bandwidth, processors and links (NVLink, or PCIe 4.0 x16) are those of NVIDIA's data sheets. Rates: the best of many
# shapes (A100, H100: github.com/stas00/ml-engineering, compute/accelerator, 2025; an H200 has an H100's processors), or
# of some (RTX 4090, L40S in fp16: github.com/zzc0721/torch-performance-test-data, issues 78 and 43, 2025). Attention:
# FlashAttention-2 reaches 50 to 73% on an A100 (arXiv:2307.08691, abstract), 35% on an H100 (2407.08608, abstract)
GPUS = {
    "rtx4090-24g": Gpu("RTX 4090", 23.5, 165e12, 0.5, 1008e9, 128, 32e9),
    "l40s-48g": Gpu("L40S", 44.4, 269e12, 0.5, 864e9, 142, 32e9),
    "a100-40g": Gpu("A100", 39.4, 271e12, 0.5, 1555e9, 108, 300e9),
    "a100-80g": Gpu("A100", 79.1, 271e12, 0.5, 2039e9, 108, 300e9),
    "h100-80g": Gpu("H100", 79.1, 795e12, 0.35, 3350e9, 132, 450e9),
    "h200-141g": Gpu("H200", 139.8, 795e12, 0.35, 4800e9, 132, 450e9),
}
# Of a data sheet's bandwidth: 3.31 of 4.0 TB/s on a GH200 (github.com/UoB-HPC/BabelStream, issue 194), 0.92 of 1.01 on
# an RTX 4090 (github.com/krrishnarraj/clpeak, issue 106); of NVLink's 375 of 450 GB/s (github.com/NVIDIA/nccl, issue
# 1264)
REACHED = 0.83
LAUNCH = 2.5e-6  # seconds that the shortest kernel takes on the GPU
TILES = ((256, 128), (128, 256), (128, 128))  # of an output that a multiprocessor works on at a time
PIPELINE = 256  # steps along k that a tile takes more, until its pipeline is full: four stages of 64


def kernel_seconds(kernel: Kernel, gpu: Gpu) -> float:
    """Seconds of one kernel on a GPU that has nothing else to do."""
    of_attention = kernel.flops / (gpu.attention * PEAKS[gpu.name])
    compute = product_seconds(*kernel.sides, gpu) if kernel.sides else of_attention
    return max(LAUNCH, compute, kernel.bytes / (REACHED * gpu.bandwidth))


def product_seconds(m: int, n: int, k: int, gpu: Gpu) -> float:
    """Seconds of a product of an m x k and a k x n matrix, were there no memory to wait for.

    The output is cut into tiles, each multiprocessor works on one at a time, and the last round of tiles takes as long
    as a full one (NVIDIA, Matrix Multiplication Background User's Guide, sections 3 and 4: tile and wave
    quantization). Where there are fewer tiles than multiprocessors, several share a tile, along k (split-K).
    """

    def with_tiles(height: int, width: int) -> float:
        tiles = ceil(m / height) * ceil(n / width)
        shares = max(1, gpu.processors // tiles)
        rounds = ceil(tiles * shares / gpu.processors)
        return rounds * 2 * height * width * (k / shares + PIPELINE)

    return min(with_tiles(*tile) for tile in TILES) * gpu.processors / gpu.rate


def gpu_seconds(kernels: Counter[Kernel], gpu: Gpu) -> float:
    """Seconds that a GPU is busy with all of these kernels."""
    return sum(times * kernel_seconds(kernel, gpu) for kernel, times in kernels.items())


def limit_seconds(kernels: Counter[Kernel], gpu: Gpu) -> float:
    """The same for products of matrices and attention alone, which no code can leave out."""
    return gpu_seconds(Counter({kernel: times for kernel, times in kernels.items() if kernel.flops}), gpu)


def kind_of_gpu(name: str, memory: float) -> str | None:
    """The kind in GPUS that a GPU is, by its name and GiB as torch gives them; None where it is none of them."""
    word = next((word for word in PEAKS if word in name), None)
    return next((kind for kind, gpu in GPUS.items() if gpu.name == word and abs(gpu.memory - memory) < 2), None)
