"""Which splits of a model the native engine can decode. Imports no torch: recipes are checked with it."""

from __future__ import annotations

from megatron_parallel_r1.errors import UserError


def check_split(pipeline: int, context: int) -> None:
    """Refuses a model whose layers or rows are split over processes.

    Raises:
        UserError: one of the two sizes is not 1.
    """
    sizes = (("pipeline", pipeline), ("context", context))
    over = " and ".join(f"{name} {size}" for name, size in sizes if size > 1)
    if over:
        raise UserError(
            f"native engine: {over} is not supported: every process decodes all layers, split over a tensor "
            "group only; use rollout servers (SGLang; or mode replay with any server engine), or set "
            "parallel.pipeline and parallel.context to 1"
        )


def check_heads(heads: int, kv_heads: int, tensor: int) -> None:
    """Checks that `tensor` processes can share attention's heads.

    Raises:
        UserError: a head would be cut.
    """
    for name, size in (("heads", heads), ("kv_heads", kv_heads)):
        if size % tensor:
            fits = next(n for n in range(tensor, 0, -1) if heads % n == 0 and kv_heads % n == 0)
            raise UserError(
                f"native engine: tensor {tensor} does not divide the model's {name} {size}; "
                f"set parallel.tensor to {fits}"
            )
