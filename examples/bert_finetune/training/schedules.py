"""Learning rate schedules."""

import math

import optax

from bert_finetune.arguments import Arguments


def make_schedule(args: Arguments, peak: float, num_steps: int) -> optax.Schedule:
    """Returns the schedule of `--lr_scheduler_type`, after an optional linear warm-up.

    Linear and cosine schedules reach zero after ``num_steps``, including the warm-up.
    A longer warm-up stops short of the peak.
    """
    num_warmup = args.warmup_steps or math.ceil(num_steps * args.warmup_ratio)
    num_decay = max(1, num_steps - num_warmup)
    schedule = {
        "linear": optax.linear_schedule(peak, 0.0, num_decay),
        "cosine": optax.cosine_decay_schedule(peak, num_decay),
        "constant": optax.constant_schedule(peak),
        "constant_with_warmup": optax.constant_schedule(peak),
    }[args.lr_scheduler_type]
    if num_warmup == 0:
        return schedule
    rise = optax.linear_schedule(0.0, peak, num_warmup)
    return optax.join_schedules([rise, schedule], [num_warmup])
