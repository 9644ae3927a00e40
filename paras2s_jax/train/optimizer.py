"""AdamW with warm-up, and which variables decay."""

import jax
import optax

SCHEDULES = ("constant", "cosine")
# Shifts and norm scales; decaying them only fights the normalisation.
UNDECAYED = ("bias", "scale")


def make_schedule(
    lr: float, *, warmup_steps: int, total_steps: int, schedule: str = "cosine"
) -> optax.Schedule:
    """Linear warm-up from lr / warmup_steps, then constant or a cosine down to 0 at total_steps."""
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known are {list(SCHEDULES)}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps {warmup_steps} must lie in 0..total_steps {total_steps}")
    after = optax.constant_schedule(lr)
    if schedule == "cosine":
        after = optax.cosine_decay_schedule(lr, max(1, total_steps - warmup_steps))
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(lr / warmup_steps, lr, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    lr: float,
    *,
    warmup_steps: int = 0,
    total_steps: int,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    b2: float = 0.95,
    schedule: str = "cosine",
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) behind clipping by global norm; biases and scales do not decay."""
    rate = make_schedule(lr, warmup_steps=warmup_steps, total_steps=total_steps, schedule=schedule)
    adamw = optax.adamw(rate, b2=b2, weight_decay=weight_decay, mask=_decays)
    if clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def _decays(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)
