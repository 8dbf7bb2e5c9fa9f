"""Losses in the log domain: log L, and gradients that are divided by L already.

    log_loss, gradient = exponential(margins)           # gradient_i = (dL/dm_i)/L
    log_loss, gradient = cross_entropy(logits, target)  # gradient = (dL/dlogits)/L

Where a loss is below 1e-300 neither it nor its gradient is a number of float64, but log L and the gradient
over L are. All functions are right at log L = -1e4 and beyond, in the dtype of their input; use float64. A
model's gradient over L is then that of ``outputs.backward(gradient)``: `model_gradient` and
`streamed_gradient` do that.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["cross_entropy", "exponential", "logistic", "model_gradient", "streamed_gradient"]


def exponential(margins: Tensor) -> tuple[Tensor, Tensor]:
    """L = sum_i exp(-m_i) over the last dim.

    Args:
        margins: (..., n) floating point, y_i f(x_i).

    Returns: log L, (...), and (dL/dm)/L, (..., n), which sum to -1.

    Raises: ValueError for no margins.
    """
    _check(margins, "margins")
    return torch.logsumexp(-margins, -1), -torch.softmax(-margins, -1)


def logistic(margins: Tensor) -> tuple[Tensor, Tensor]:
    """L = sum_i log(1 + exp(-m_i)) over the last dim; arguments and results as of `exponential`."""
    _check(margins, "margins")
    # A loss below e^-40 is e^-m up to rounding: taking the same from all such margins scales it, and no more.
    shift = torch.relu(margins.amin(-1, keepdim=True) - 40.0)
    z = shift - margins
    loss = functional.softplus(z, threshold=40.0).sum(-1, keepdim=True)  # beyond 40 it is z up to rounding
    return (loss.log() - shift).squeeze(-1), torch.sigmoid(z) / -loss


def cross_entropy(logits: Tensor, target: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """L = mean (or sum) over n examples of -log softmax(f_i)_{y_i}.

    Args:
        logits: (..., n, k) floating point.
        target: (n,) int64, or (..., n).
        reduction: "mean" or "sum".

    Returns: log L, (...), and (dL/df)/L, (..., n, k).

    Raises: ValueError for shapes or a reduction that are not as above.
    """
    _check(logits, "logits")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if logits.ndim < 2 or target.shape not in (logits.shape[:-1], logits.shape[-2:-1]):
        raise ValueError(
            f"target must have shape {tuple(logits.shape[-2:-1])} for logits of shape {tuple(logits.shape)}, "
            f"got {tuple(target.shape)}"
        )
    index = target.expand(logits.shape[:-1])[..., None]
    gaps = logits - logits.gather(-1, index)
    others = torch.ones_like(gaps, dtype=torch.bool).scatter_(-1, index, False)
    z = torch.logsumexp(gaps.masked_fill(~others, -math.inf), -1, keepdim=True)
    softplus = functional.softplus(z, threshold=40.0)
    each = torch.where(z < -40.0, z, softplus.log())  # log of the loss of an example
    log_loss = torch.logsumexp(each.flatten(-2), -1)
    # dl/df_k = exp(f_k - f_y - log(1 + e^z)); the one of y is minus the sum of the others, e^z/(1 + e^z).
    scale = -softplus - log_loss[..., None, None]
    gradient = torch.where(others, torch.exp(gaps + scale), -torch.exp(z + scale))
    if reduction == "mean":
        log_loss = log_loss - math.log(logits.shape[-2])
    return log_loss, gradient


def _check(x: Tensor, name: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")


def model_gradient(model: Callable[[Tensor], Tensor], x: Tensor, loss: Callable, *args) -> Tensor:
    """Sets the parameters' ``grad`` to the gradient of L over L, added to what is there, and returns log L.

    Args:
        model: x -> outputs, with a graph.
        loss: (outputs, *args) -> (log L, (dL/doutputs)/L), as the functions of this module.
    """
    outputs = model(x)
    log_loss, gradient = loss(outputs.detach(), *args)
    outputs.backward(gradient)
    return log_loss


def streamed_gradient(
    model: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Callable = cross_entropy
) -> Tensor:
    """As `model_gradient`, of the sum of the losses of batches (x, target), one batch in memory at a time.

    Batches are summed against a running log-loss, so nothing over- or underflows. `loss` gets (outputs,
    target).

    Returns: log L. The parameters' ``grad`` is replaced.

    Raises: ValueError for no batches.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    total, sums = None, [torch.zeros_like(p) for p in params]
    for x, target in batches:
        outputs = model(x)
        log_loss, gradient = loss(outputs.detach(), target)
        new = log_loss if total is None else torch.logaddexp(total, log_loss)
        grads = torch.autograd.grad(outputs, params, gradient * torch.exp(log_loss - new), allow_unused=True)
        for i, g in enumerate(grads):
            if total is not None:
                sums[i] *= torch.exp(total - new)
            if g is not None:
                sums[i] += g
        total = new
    if total is None:
        raise ValueError("batches must not be empty")
    for p, s in zip(params, sums):
        p.grad = s
    return total
