"""Memory and traffic of a chip from 16 to 1024 chips, at constant work per chip: both stay flat.

    python benchmarks/compile_scaling.py --output FILE

Compiles the selective train step of the `small` model for slices of TPU v5p of growing size (needs libtpu, no TPU):
weights and moments split over 16 chips (`MeshConfig.fsdp`), the groups of 16 multiplied (`data`), 4 rows of 1024 tokens
for each chip. A ratio is that of a slice to the one of 16 chips. Nothing is timed; some minutes of compiling per slice.
"""

import argparse
import dataclasses
from typing import Any

import jax

from slm_jax.chips import GIB
from slm_jax.compile.compile_ahead import plan_step
from slm_jax.compile.programs import Run, train_steps
from slm_jax.compile.topology import topology_devices
from slm_jax.data.mixture import MixtureComponent
from slm_jax.files import write_json
from slm_jax.mesh import MeshConfig, make_mesh
from slm_jax.models.model_config import SIZES
from slm_jax.score.selection import Selection
from slm_jax.train.phases import Phase

SLICES = ("v5p:2x2x4", "v5p:4x4x4", "v5p:4x4x16", "v5p:4x16x16")  # an axis of the mesh takes whole dimensions
ROWS_PER_CHIP, LENGTH, FSDP = 4, 1024, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", nargs="+", default=SLICES, metavar="TOPOLOGY")
    parser.add_argument("--quick", action="store_true", help="the two smallest slices and two layers")
    parser.add_argument("--output", default=None)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    found = []
    print("| chips | mesh | GiB per chip | ratio | GiB sent per chip | ratio | TFLOP per chip | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for topology in arguments.slices[: 2 if arguments.quick else None]:
        found.append(measured(topology, layers=2 if arguments.quick else 8))
        print(row(found[-1], found[0]), flush=True)
    if arguments.output:
        write_json(arguments.output, found)


def measured(topology: str, layers: int) -> dict[str, Any]:
    devices, chip = topology_devices(topology)
    model = dataclasses.replace(SIZES["small"], vocab_size=32000, num_layers=layers, compute_dtype="bfloat16")
    phase = Phase(
        1, mixture=[MixtureComponent("nowhere")], batch_size=ROWS_PER_CHIP * len(devices), selection=Selection()
    )
    run = Run(model, [phase], make_mesh(MeshConfig(data=-1, fsdp=FSDP), devices), LENGTH, {}, {})
    [step] = train_steps(run)
    return {"topology": topology, "mesh": dict(run.mesh.shape)} | plan_step(step, chip)


def row(plan: dict[str, Any], first: dict[str, Any]) -> str:
    """Markdown of a slice beside the first."""

    def amounts(plan: dict[str, Any]) -> tuple[float, ...]:
        sent = sum(x["bytes"] for x in plan["collectives"])
        return plan["memory"]["total"] / GIB, sent / GIB, plan["flops"]["total"] / 1e12

    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    chips = plan["rows"] // ROWS_PER_CHIP
    cells = [f"{now:.3f} | {now / then:.3f}" for now, then in zip(amounts(plan), amounts(first), strict=True)]
    return f"| {chips} | {mesh} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
