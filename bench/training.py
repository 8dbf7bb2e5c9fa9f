"""What is timed of a model's training: one of its parts, or the whole step."""

import torch

MODES = ("forward", "backward", "step", "full")
LR = 1e-9  # the weights stay what they are however often a step runs


def timed(mode, forward, optimizer, x, dy, *, set_to_none=True):
    """A function of no arguments to time. The gradient `dy` of the output is given, so that no loss adds to it.

    forward: forward(x), recorded for a backward where anything requires one.
    backward: the gradients of the parameters, and of x where x requires one, of one forward, again and again.
    step: optimizer.step(), with random gradients.
    full: forward, backward, step and zero_grad.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if mode == "forward":
        return lambda: forward(x)
    if mode == "backward":
        y, leaves = forward(x), [*parameters, x] if x.requires_grad else parameters
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    if mode == "step":
        for p in parameters:
            p.grad = torch.randn_like(p)
        return optimizer.step

    def full():
        forward(x).backward(dy)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        x.grad = None

    return full


def three_steps(*arguments, **options):
    """What peak memory is taken of."""
    step = timed("full", *arguments, **options)
    for _ in range(3):
        step()
