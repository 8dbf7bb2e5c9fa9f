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


def in_the_same_memory(optimizers):
    """Lets the largest weights of several optimizers, their gradients and state lie in the same memory, one set for all,
    so that they are compared on the same pages: which pages a tensor gets changes the time of a step by up to 10%.

    These weights have the same shape and the same values; gradient and state are what each has now. One that is stepped
    inside its backward has had no step yet.
    """
    shared = []
    for optimizer in optimizers:
        weight = max((p for group in optimizer.param_groups for p in group["params"]), key=torch.Tensor.numel)
        state = optimizer.state.get(weight, {}).values()
        alike = [t for t in state if isinstance(t, torch.Tensor) and t.shape == weight.shape]
        for i, tensor in enumerate([weight, *alike, *([] if weight.grad is None else [weight.grad])]):
            if i == len(shared):
                shared.append(tensor.data)
            tensor.data = shared[i]


def three_steps(*arguments, **options):
    """What peak memory is taken of."""
    step = timed("full", *arguments, **options)
    for _ in range(3):
        step()
