"""Compile the convolution for GPUs that need not be present, and print a line of JSON for each; no arguments."""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsconv.backends.cuda import kernels

CAPABILITIES = (80, 86, 89, 90, 100)
TILES = {"large": (64, 64, 4, 3), "small": (16, 64, 2, 4)}
ALIGNED = ("row_bytes", "outputs", "group_rows", "group_outputs", "y_stride", "q_row_bytes", "q_column", "q_end")


def source(tile: tuple[int, int, int, int], one_tap: bool) -> ASTSource:
    pixels, outputs, _, stages = tile
    constants = {
        "BLOCK": 64, "NIBBLES": True, "SCALES": "halves", "LOOP": True, "ODD": False, "ONE_TAP": one_tap,
        "DENSE": one_tap, "SMALL": True, "BIAS": True,
        "BATCHNORM": True, "RESIDUAL": False, "ACTIVATION": "relu", "STORE": False,
        "QBLOCK": 64, "QBITS": 8, "QSIGN": "adaptive", "QSHIFT": True, "RAGGED": False, "WIDE": False, "ASM": True,
        "TILE_P": pixels, "TILE_O": outputs, "STAGES": stages,
    }  # fmt: skip
    kernel = kernels.convolve
    pointers = {"x_ptr": "*i8", "w_ptr": "*i8", "qm_ptr": "*i8", "k_ptr": "*i32"}
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name in ("alpha", "beta") else "i32"
        if name.endswith("_ptr") or name in ALIGNED:
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def main() -> None:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for capability, (size, tile) in itertools.product(CAPABILITIES, TILES.items()):
        options = {"num_warps": tile[2], "num_stages": tile[3], "enable_fp_fusion": False}
        made = triton.compile(source(tile, one_tap=False), target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        ptx = made.asm["ptx"]
        row = {
            "capability": capability,
            "size": size,
            "instructions": sorted(set(re.findall(r"(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.\S*", ptx))),
            "integers": bool(re.search(r"(mma\S*\.s8\.s8|kind::i8)", ptx)),
            "registers": int(found[1]),
            "stack": int(found[2]),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
