"""Stage `compile`: compiles the steps of a run for TPUs or GPUs that are not attached, and reports what they need."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax

from slm_jax import config as config_lib
from slm_jax.chips import GIB, Chip
from slm_jax.compile import costs
from slm_jax.compile.hlo import Program
from slm_jax.compile.programs import StepProgram, bound_run, score_step, train_steps
from slm_jax.compile.topology import topology_devices
from slm_jax.configurable import AtLeast, OneOf, configurable
from slm_jax.errors import UserError
from slm_jax.files import write_json

PROGRAMS = ("train", "score")
ASSUMPTIONS = (
    "FLOPs are those of matrix products, 2 for each multiplication and addition, on one chip. They are read from the "
    "compiled program, with every loop body multiplied by its trip count; XLA's own analysis counts it once.",
    "Two things cannot be read there: attention kernels count what they must compute, causally and within the window; "
    "loops over the tokens that have a loss count as if all tokens had one.",
    "Model FLOPs are ModelConfig.flops_per_token, a third of it for scoring; they exclude recomputation.",
    "Bytes sent assume that every collective is a ring over the chips of its axes; a loop of unknown length counts "
    "once.",
    "JAX uses three quarters of a GPU's memory for programs, or the fraction in XLA_CLIENT_MEM_FRACTION.",
    "On a GPU XLA times several kernels for each product; here a rule chooses, and temporaries may differ slightly.",
    "MFU is bounded by the slowest of three, each at the data sheet's peak and perfectly overlapped: the products; "
    "reading and writing the state once; sending the collectives' bytes over all links at once. Real runs are slower.",
)


@configurable("compile")
def compile_ahead(
    topology: str,
    output: str = "plan.json",
    sequence_length: Annotated[int, AtLeast(2)] | None = None,
    programs: Sequence[Annotated[str, OneOf(PROGRAMS)]] = PROGRAMS,
) -> dict[str, Any]:
    """Compiles the train and score steps of a run's gin file for TPUs or GPUs, on a machine that has none.

    Prints, and writes as JSON: memory per chip by kind, FLOPs, bytes sent by each collective over each axis of the
    mesh, an upper bound on MFU, and whether it fits or what to change.

    Args:
      topology: TPUs such as v5e:4x4 (16 chips), v5p:4x4x4 (64), v4:4x4x8 (128), v6e:16x16 (256); or the GPUs of one
        machine, such as h100:1 or a100:8.
      output: file for the JSON.
      sequence_length: tokens per row; None takes the corpus', which must then be on this machine.
      programs: what to compile, of `train` and `score`.

    Raises:
      UserError: something does not fit; the plan is still written.
    """
    if not programs:
        raise UserError("setting-empty", f"compile.programs is (): it takes {' and '.join(map(repr, PROGRAMS))}")
    # Refused before minutes of compiling rather than after them.
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "compile-output", f"compile.output {output}: cannot create its folder ({error.strerror}); choose another"
        ) from error
    if Path(output).is_dir():
        raise UserError("compile-output", f"compile.output {output} is a folder: name a file in it")
    # No device of this machine is needed, and one that is attached may be busy.
    jax.config.update("jax_platforms", "cpu")
    devices, chip = topology_devices(topology)
    run = bound_run(devices, sequence_length)
    config_lib.print_unused()
    shape = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    kind = devices[0].device_kind
    print(f"compile: {run.model.parameter_count() / 1e6:.1f}M parameters on {len(devices)} x {kind}, mesh {shape}")

    # ---- Each step, compiled for the topology
    steps = [*(train_steps(run) if "train" in programs else ()), *([score_step(run)] if "score" in programs else ())]
    plans = []
    for number, step in enumerate(steps, 1):
        about = f"{step.work.name}, {number} of {len(steps)}: seconds for a small model, minutes for a large one"
        print(f"compile: {about}", flush=True)
        plans.append(plan_step(step, chip))
        print(describe(plans[-1]), flush=True)
    plan = {
        "topology": topology,
        "chips": len(devices),
        "chip": {"kind": kind, **dataclasses.asdict(chip)},
        "mesh": dict(run.mesh.shape),
        "model": run.model,
        "parameters": run.model.parameter_count(),
        "fits": all(plan["fits"] for plan in plans),
        "steps": plans,
        "assumptions": ASSUMPTIONS,
        "environment": config_lib.environment(),
    }
    write_json(output, plan)
    for step in plans:
        if not step["fits"]:
            raise UserError("compile-no-fit", f"{step['name']} {step['verdict']} (the plan is {output})")
    print(f"compile: everything fits, see {output}")
    return plan


def plan_step(step: StepProgram, chip: Chip) -> dict[str, Any]:
    """Compiles a step and returns what it needs, as JSON."""
    work, start = step.work, time.time()
    about = {
        "name": work.name,
        "rows": work.rows,
        "length": work.length,
        "gradient_accumulation_steps": work.gradient_accumulation_steps,
    }
    # A program that the compiler refuses for its memory still says how much it needs.
    held, program = (step.weights, step.moments, step.batch), None
    try:
        compiled = step.compile()
        about["compile_seconds"] = time.time() - start
        program = Program(compiled.as_text())
        needed = costs.measured(held, compiled, costs.kept_activations(program, work))
    except jax.errors.JaxRuntimeError as error:
        about["compile_seconds"] = time.time() - start
        needed = costs.refused(held, str(error))
        if needed is None:
            raise
    about |= {
        "memory": dataclasses.asdict(needed) | {"total": needed.total, "available": chip.memory},
        "fits": needed.total <= chip.memory,
        "verdict": costs.verdict(needed, chip.memory, work),
    }
    return about | (_costs(step, program, chip) if program else {})


def _costs(step: StepProgram, program: Program, chip: Chip) -> dict[str, Any]:
    work = step.work
    tokens = work.rows * work.length / work.mesh.size  # of one chip
    model_flops = tokens * work.model.flops_per_token(work.length) / (1 if work.training else 3)
    flops = costs.products(program, work)
    sent = costs.traffic(program, work.mesh)
    state = costs.tree_bytes((step.weights, step.moments)) * (2 if work.training else 1)
    seconds = {
        "products": flops.total / chip.peak_flops,
        "memory": state / chip.memory_bandwidth,
        "links": sum(x.bytes for x in sent) / chip.link_bandwidth,
    }
    slowest = max(seconds, key=lambda name: seconds[name])
    return {
        "flops": dataclasses.asdict(flops) | {"total": flops.total, "model": model_flops},
        "collectives": [dataclasses.asdict(x) for x in sent],
        "seconds_at_least": seconds,
        "bound_by": slowest,
        "mfu_at_most": model_flops / chip.peak_flops / seconds[slowest],
    }


def describe(plan: dict[str, Any]) -> str:
    """A step's plan as text."""
    kinds = plan["memory"]
    parts = ", ".join(f"{k} {kinds[k] / GIB:.2f}" for k in kinds if k not in ("total", "available"))
    lines = [
        f"{plan['name']}: {plan['rows']} rows of {plan['length']} tokens, {plan['gradient_accumulation_steps']} "
        f"micro-batches, compiled in {plan['compile_seconds']:.0f} s",
        f"  GiB per chip   {kinds['total'] / GIB:.2f} of {kinds['available'] / GIB:.2f}: {parts}",
    ]
    if "flops" in plan:
        flops = plan["flops"]
        parts = ", ".join(
            f"{kind} {flops[kind] / 1e12:.1f}" for kind in ("counted", "attention", "head") if flops[kind]
        )
        lines.append(f"  TFLOP per chip {flops['total'] / 1e12:.1f} ({parts}), the model's {flops['model'] / 1e12:.1f}")
        for x in plan["collectives"]:
            lines.append(f"  GiB sent       {x['bytes'] / GIB:.3f} by {x['count']} {x['kind']} over {x['axes']}")
        seconds = ", ".join(f"{name} {value:.4f}" for name, value in plan["seconds_at_least"].items())
        lines.append(f"  seconds        at least: {seconds}")
        lines.append(f"  MFU            at most {plan['mfu_at_most']:.2f}, bounded by {plan['bound_by']}")
    return "\n".join([*lines, f"  {plan['verdict']}"])
