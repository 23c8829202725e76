"""A plan as text for people, and as JSON for programs."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from .plan import Plan

__all__ = ["plan_fields", "plan_lines"]


def plan_fields(plan: Plan) -> dict[str, Any]:
    """Name a plan's figures, with the sums."""
    return {**asdict(plan), "seconds": plan.seconds, "peak_bytes": plan.peak_bytes}


def plan_lines(plan: Plan) -> Iterator[str]:
    """Show a plan as a table."""
    machine = plan.machine
    yield (
        f"machine    {machine.num_threads} threads, products {machine.float32_gflops:.0f} GFLOP/s in float32 and "
        f"{machine.bfloat16_gflops:.0f} in bfloat16, plain read {machine.read_gbps:.1f} GB/s; "
        f"the model runs in {plan.model_dtype}"
    )
    if plan.num_workers > 1:
        yield f"workers    {plan.num_workers} of {machine.num_threads} threads, each as fast as stated; GB are of one"
    yield f"text       {plan.num_tokens:,} tokens"
    yield f"           {'stage':12s} {'seconds':>8s} {'GB':>6s}"
    yield f"           {'start':12s} {plan.start_seconds:8.1f}"
    for stage in plan.stages:
        detail = f"  {stage.detail}" if stage.detail else ""
        yield f"           {stage.name:12s} {stage.seconds:8.1f} {stage.peak_bytes / 1e9:6.2f}{detail}"
    yield f"           {'in all':12s} {plan.seconds:8.1f} {plan.peak_bytes / 1e9:6.2f}  with nothing in the cache"
    yield f"disk       {plan.bundle_bytes / 1e6:.1f} MB bundle, and {plan.scratch_bytes / 1e6:.1f} MB for stage results"
    with_pack = "" if plan.is_thin else f"{plan.token_bytes_pack / 1e6:.1f} MB with a pack (keep {plan.keep:.3f}), "
    yield f"a token    {with_pack}{plan.token_bytes_dense / 1e6:.1f} MB dense"
    if (fewest := plan.fewest) is not None:
        yield (
            f"experts    {fewest.num_foreseen} of each layer stay in these figures; if only {fewest.num_experts} do: "
            f"{fewest.seconds:.1f} s, {fewest.peak_bytes / 1e9:.2f} GB, {fewest.bundle_bytes / 1e6:.1f} MB bundle, "
            f"{fewest.token_bytes_pack / 1e6:.1f} MB a token, {fewest.tok_s_pack:.0f} tok/s"
        )
    if plan.token_share is not None:
        yield f"           where the engine gains by it {plan.token_share:.2f} of the layers' weights, not in tok/s"
    pack = "" if plan.is_thin else f"{plan.tok_s_pack:.0f} with a pack, "
    yield f"tok/s      about {pack}{plan.tok_s_dense:.0f} dense, on this machine"
