"""Weight normalization as functions.

``kind="swn"`` is w = g v/‖v‖ with the radius parameter g; ``kind="ewn"`` is w = e^α v/‖v‖, and the radius parameter,
the argument ``g`` everywhere, is α, the log of the radius. A *row* is the slice of a weight at one index of ``dim``
(``dim=0`` of a Linear or Conv weight: one output neuron or filter); ``dim=None`` takes the whole tensor as one row.

CPU and CUDA tensors of float32, float64, bfloat16 and float16 go to the kernels; sums are kept in float32, for float64
in float64. Other devices get the same mathematics in torch operations, and a warning once. A zero row has no direction:
its w and all its gradients are 0.
"""

import torch
from torch.overrides import has_torch_function

from . import _C

__all__ = ["weight_norm", "foreach_weight_norm", "weight_norm_linear", "row_norm", "project_", "normalize_", "polar_sgd_",
           "polar_adam_", "telemetry"]

# The operators serve where a graph is recorded or an argument overrides torch functions; elsewhere the pybind11
# functions, which dispatch to the same operators, save more than a microsecond a call.
_ops = torch.ops.wnkernels
_compiling = torch.compiler.is_compiling


def _explain(name, arguments, error):
    """pybind11 lists signatures where an argument has the wrong type; name the argument instead."""
    if "incompatible function arguments" not in str(error):
        raise error
    for argument, value in zip(getattr(_ops, name).default._schema.arguments, arguments):
        expected = str(argument.type)
        good = {
            "Tensor": isinstance(value, torch.Tensor),
            "Optional[Tensor]": value is None or isinstance(value, torch.Tensor),
            "Optional[int]": value is None or (isinstance(value, int) and not isinstance(value, bool)),
            "List[Tensor]": isinstance(value, list) and all(isinstance(t, torch.Tensor) for t in value),
            "List[int]": isinstance(value, list) and all(isinstance(n, int) for n in value),
            "str": isinstance(value, str),
            "Optional[bool]": value is None or isinstance(value, bool),
            "float": isinstance(value, (int, float)),
        }.get(expected, value is None or isinstance(value, torch.dtype))
        if not good:
            allowed = "torch.dtype or None" if argument.name == "out_dtype" else expected
            raise TypeError(f"{name}: {argument.name} must be {allowed}, got {type(value).__name__}") from None
    raise error


def weight_norm(v, g, dim=0, kind="swn", out_dtype=None):
    """The weight w = s v/‖v‖ per row, with s = g (``kind="swn"``) or s = e^g (``kind="ewn"``, g is α).

    Salimans & Kingma, arXiv:1602.07868, eq. 2; EWN: Morwani & Ramaswamy, arXiv:2010.12909, sec. 3. Differentiable to
    any order in v and g, in reverse and forward mode.

    Args:
        v: direction parameter, any shape and memory layout, float32, float64, bfloat16 or float16.
        g: radius parameter, of v's shape with 1 in every dim but ``dim``, or (R,) with R = v.shape[dim]; 0-d or all
            ones for ``dim=None``. Of v's dtype, or float32 beside a 16-bit v.
        dim: the dim of rows, negative counts from the end, or None.
        kind: "swn" or "ewn".
        out_dtype: dtype of w, default v's: v's dtype, a 16-bit type for a float32 v, or float32 for a 16-bit v.

    Returns:
        w, of v's shape, and of v's memory format where v is dense.

    Raises:
        ValueError: g's shape, dim or kind is not as above.
        TypeError: a dtype or an argument's type is not as above.
        RuntimeError: v and g are on different devices.
    """
    if _compiling() or has_torch_function((v, g)):
        return _ops.weight_norm(v, g, dim, kind, out_dtype)
    try:
        return _C.weight_norm(v, g, dim, kind, out_dtype)
    except TypeError as error:
        _explain("weight_norm", (v, g, dim, kind, out_dtype), error)


_KINDS = {"swn": 0, "ewn": 1}


def _front_dim(dim, v):
    """A dim for the operators on lists: counted from the front, and -1 for None."""
    if dim is None:
        return -1
    if not -v.ndim <= dim < v.ndim:
        raise ValueError(f"dims must be None or in [{-v.ndim}, {v.ndim - 1}] for a v of {v.ndim} dimensions, got {dim}")
    return dim % v.ndim


def foreach_weight_norm(vs, gs, dims=0, kinds="swn", out_dtype=None):
    """The weights ``weight_norm(v, g, dim, kind, out_dtype)`` of lists, in one call with one node of autograd.

    For many small weights, whose calls and launches cost more than their arithmetic. The bits are those of the single
    calls. On a CPU tensors of up to 2^15 elements share one parallel region, and larger ones are done one by one. On a
    GPU up to about a hundred weights share a launch, with those whose rows take blocks of the same size (rows of up to
    1 KiB all do); rows beyond 32 KiB (16 KiB in the backward), and dims with fewer than 32 inner elements behind an outer
    dim, have launches of their own. So it is in the backward, which runs when the gradients of all weights are there:
    they take their memory together. Weights that were not used get no gradient. Forward mode, transforms, higher
    derivatives, and devices without kernels go one by one.

    Args:
        vs, gs: lists of v and g, as in :func:`weight_norm`; of any mix of shapes, dtypes and devices.
        dims: the dim of rows of each weight, or one (or None) for all.
        kinds: "swn" or "ewn" for each weight, or one for all.
        out_dtype: of all weights, default that of each v.

    Returns:
        the tuple of w.

    Raises:
        ValueError: the lists differ in length; and, with TypeError and RuntimeError, as :func:`weight_norm`. Nothing has
            been computed then.
    """
    vs, gs = list(vs), list(gs)
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    dims = [dims] if dims is None or isinstance(dims, int) else list(dims)
    for name, values, least in (("gs", gs, len(vs)), ("dims", dims, 1), ("kinds", kinds, 1)):
        if len(values) not in (len(vs), least):
            one = "" if least == len(vs) else ", or one for all"
            raise ValueError(f"{name} must have one entry for each of the {len(vs)} vs{one}, got {len(values)}")
    for kind in kinds:
        if kind not in _KINDS:
            raise ValueError(f"kinds must be 'swn' (w = g v/|v|) or 'ewn' (w = exp(alpha) v/|v|), got {kind!r}")
    if not vs:
        return ()
    if len(dims) > 1 or dims[0] is None or dims[0] < 0:
        dims = [_front_dim(dim, v) for dim, v in zip(dims if len(dims) > 1 else dims * len(vs), vs)]
    arguments = vs, gs, dims, [_KINDS[kind] for kind in kinds], out_dtype
    if _compiling() or has_torch_function((*vs, *gs)):
        return tuple(_ops.foreach_weight_norm(*arguments))
    try:
        return tuple(_C.foreach_weight_norm(*arguments))
    except TypeError as error:
        _explain("foreach_weight_norm", arguments, error)


def weight_norm_linear(x, v, g, bias=None, kind="swn", materialize=None):
    """x wᵀ + bias for w = ``weight_norm(v, g, 0, kind)``, without w where w costs more than it saves.

    Without w, y = (x vᵀ)·(s/‖v‖) + bias, and the backward projects the gradient of w in place into that of v. The norm
    is computed in the call, so it is never stale. Under autocast a float32 v goes to the lower type in the pass that
    normalizes it.

    Args:
        x: (..., N), of v's dtype (outside of autocast).
        v: (R, N).
        g: (R, 1) or (R,), see :func:`weight_norm`.
        bias: (R,) or None.
        kind: "swn" or "ewn".
        materialize: True or False choose; None leaves it to the measured rule (``materialize_is_faster`` in
            csrc/linear.cpp). Without w on a GPU, rows of norm beyond 1e±18 may leave the range of x vᵀ in float32.

    Returns:
        y: (..., R).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`weight_norm`, and for x or bias of another shape or dtype.
    """
    if _compiling() or has_torch_function((x, v, g, bias)):
        return _ops.weight_norm_linear(x, v, g, bias, kind, materialize)
    try:
        return _C.weight_norm_linear(x, v, g, bias, kind, materialize)
    except TypeError as error:
        _explain("weight_norm_linear", (x, v, g, bias, kind, materialize), error)


def row_norm(v, dim=0):
    """The norm of each row: (R,), or 0-d for ``dim=None``, in float32 (float64 for a float64 v).

    Free of overflow and underflow: any finite row has the norm that its numbers have. Differentiable to any order; the
    gradient of a zero row is 0. Raises as :func:`weight_norm`.
    """
    if _compiling() or has_torch_function((v,)):
        return _ops.row_norm(v, dim)
    try:
        return _C.row_norm(v, dim)
    except TypeError as error:
        _explain("row_norm", (v, dim), error)


def project_(grad, v, g, dim=0, kind="swn"):
    """Turns a gradient of w into that of v, in place, and returns that of g (of α for "ewn").

    ``grad`` := (s/‖v‖)(G − ⟨G, v⟩v/‖v‖²), one pass, no memory: for a gradient buffer that the caller owns.

    Args:
        grad: dL/dw, dense, of v's shape; of a dtype that ``weight_norm`` could give w. Overwritten.
        v, g, dim, kind: as in :func:`weight_norm`.

    Returns:
        dL/dg, of g's shape and dtype.

    Raises:
        ValueError: shapes, dim or kind do not fit, or grad is not dense.
        RuntimeError: grad shares memory with v, or requires gradients itself while they are recorded.
    """
    if _compiling() or has_torch_function((grad, v, g)):
        return _ops.project_(grad, v, g, dim, kind)
    try:
        return _C.project_(grad, v, g, dim, kind)
    except TypeError as error:
        _explain("project_", (grad, v, g, dim, kind), error)


def normalize_(w, dim=0, norm=1.0):
    """Scales each row of w in place to length ``norm`` and returns w. Zero rows stay zero.

    Args:
        w: dense, any shape; overwritten.
        dim: as in :func:`weight_norm`.
        norm: a number, or a tensor of shape (R,) (one element for ``dim=None``).

    Raises:
        ValueError: w is not dense, norm's shape or dim does not fit.
        RuntimeError: w requires gradients while they are recorded.
    """
    length, value = (norm, 1.0) if isinstance(norm, torch.Tensor) else (None, norm)
    if _compiling() or has_torch_function((w, norm)):
        _ops.normalize_(w, dim, length, value)
        return w
    try:
        _C.normalize_(w, dim, length, value)
    except TypeError as error:
        _explain("normalize_", (w, dim, length, value), error)
    return w


def polar_sgd_(weights, grads, radius, norm, momentum_buffers=None, radius_momentum=None, *, kind, dims, lr, radius_lr,
               momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0, radius_weight_decay=0.0, maximize=False,
               retraction="project", first_step=False, grad_scale=None, found_inf=None, copies=None, telemetry=None):
    """One step of SGD on (radius, v), taken on the weights themselves, in place.

    Exactly what ``torch.optim.SGD`` does to g (α) and v of w = g v/‖v‖ (e^α v/‖v‖), without v: beside a weight only its
    radius parameter and ‖v‖ are kept. The rule is ``reference.polar_sgd_step``; csrc/step.h derives it. Every tensor is
    read once and written once. All lists have one tensor per weight; a row whose norm is not the kept radius has been
    edited, and its radius follows the weight. A weight's row that is zero has no direction and stays as it is.

    On a GPU all weights go in one launch, or in few: very long rows, and lists of more than about fifty weights, take
    more. Nothing waits for the device, and the call can be captured in a CUDA graph, which keeps the numbers but reads
    tensors, ``found_inf`` and ``grad_scale`` among them, when it is replayed.

    Args:
        weights: float32 or float64, dense, overwritten. For a 16-bit parameter: its float32 master copy.
        grads: dL/dw, of the weights' shapes and dtype; beside ``copies`` of theirs or float32.
        radius: float64 (R,), signed g or α; for ``kind="unit"`` the fixed length. Overwritten.
        norm: float64 (R,), ‖v‖. Overwritten.
        momentum_buffers: like the weights, in the coordinates of v, or None without momentum. Overwritten.
        radius_momentum: float64 (R,), or None without momentum. Overwritten.
        kind: "swn", "ewn" or "unit".
        dims: the dim of rows of each weight, or None for one row.
        lr, radius_lr, momentum, weight_decay, radius_weight_decay: numbers, tensors of one element, or, beside one
            weight, of shape (R,); tensors on the weights' device, or of one element on the CPU. ``weight_decay`` acts on v, ``radius_weight_decay`` on g or α.
        dampening, nesterov, maximize: as in ``torch.optim.SGD``.
        retraction: "project" as torch; "renormalize" keeps ‖v‖; "geodesic" turns by lr s‖G⊥‖/‖v‖² along the great
            circle and keeps ‖v‖, without momentum and decay of v.
        first_step: the momentum starts as the gradient itself, as in torch.
        grad_scale, found_inf: 0-d float32, of ``torch.amp.GradScaler``: the factor on the gradients (they are not
            overwritten), and nonzero where the step is to be skipped.
        copies: the 16-bit parameters, or 16-bit copies for autocast, which get the new weights rounded; or None.
        telemetry: float64 (R, 4) each, overwritten with what the function ``telemetry`` reads; or None. Its columns are
            the radial gradient ⟨G, θ⟩, the tangential gradient ‖G⊥‖, and of the step's v its part across θ, squared,
            and its part along θ.

    Raises:
        ValueError, TypeError, RuntimeError: a list's length, a shape, dtype, device or choice is not as above; nothing
            has been written then.
    """
    numbers = [lr, radius_lr, weight_decay, radius_weight_decay, momentum, 1.0 if first_step else 1.0 - dampening]
    _step("polar_sgd_", (
        weights, grads, radius, norm, momentum_buffers or [], radius_momentum or [], copies or [], telemetry or [],
        kind, front_dims(dims, weights), *numbers_and_tensors(numbers), nesterov, maximize, retraction, grad_scale,
        found_inf,
    ))


def polar_adam_(weights, grads, radius, norm, exp_avg, exp_avg_sq, radius_exp_avg, radius_exp_avg_sq,
                max_exp_avg_sq=None, radius_max_exp_avg_sq=None, *, kind, dims, step, lr, radius_lr,
                betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, radius_weight_decay=0.0, decoupled=True, maximize=False,
                retraction="project", grad_scale=None, found_inf=None, copies=None, telemetry=None):
    """One step of Adam or AdamW on (radius, v), taken on the weights themselves, in place.

    Exactly what ``torch.optim.AdamW`` (``decoupled=True``) or ``torch.optim.Adam`` does to g (α) and v; the rule is
    ``reference.polar_adam_step``. Arguments that are not below are those of :func:`polar_sgd_`.

    Args:
        exp_avg, exp_avg_sq, max_exp_avg_sq: the averages of the gradient of v and of its square, and, for amsgrad, the
            largest of the latter; like the weights. Overwritten.
        radius_exp_avg, radius_exp_avg_sq, radius_max_exp_avg_sq: the same of the radius, float64 (R,). Overwritten.
        step: the count of steps with this one, 1 on the first: a number or a tensor of one element. On a GPU the kernel
            computes the bias corrections from it.
        betas, eps: as in ``torch.optim.Adam``; numbers or tensors of one element.
        retraction: "project" or "renormalize".

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`polar_sgd_`.
    """
    numbers = [lr, radius_lr, weight_decay, radius_weight_decay, *betas, eps, step]
    _step("polar_adam_", (
        weights, grads, radius, norm, exp_avg, exp_avg_sq, max_exp_avg_sq or [], radius_exp_avg, radius_exp_avg_sq,
        radius_max_exp_avg_sq or [], copies or [], telemetry or [], kind, front_dims(dims, weights),
        *numbers_and_tensors(numbers), decoupled, maximize, retraction, grad_scale, found_inf,
    ))


def _step(name, arguments):
    check_device(name, arguments[0])
    if _compiling():
        getattr(_ops, name)(*arguments)
    else:
        getattr(_C, name)(*arguments)


def check_device(name, weights):
    """Raises NotImplementedError where this build has no kernels of the steps for the weights."""
    if len(weights) and not (weights[0].is_cpu or weights[0].is_meta):
        if not weights[0].is_cuda or not _C.build_info["cuda"]:
            raise NotImplementedError(
                f"{name}: weights must be on the CPU, or on a CUDA device for a build with CUDA; got {weights[0].device} "
                "(python -m wnkernels info tells what was built)"
            )


def front_dims(dims, weights):
    """Dims counted from the front, and -1 for None."""
    if len(dims) == len(weights) and None not in dims and min(dims, default=0) >= 0:
        return dims
    return [_front_dim(dim, w) for dim, w in zip(dims, weights, strict=True)]


def numbers_and_tensors(values):
    """Numbers with 0 in the place of tensors, and the tensors with None in the place of numbers."""
    numbers, tensors = values, []
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            if not tensors:
                numbers, tensors = list(values), [None] * len(values)
            numbers[i], tensors[i] = 0.0, value
    return numbers, tensors


def telemetry(table, radius, norm, kind):
    """What a polar step reported, by its ``telemetry`` table.

    Args:
        table: float64 (R, 4), as ``polar_sgd_`` or ``polar_adam_`` left it.
        radius, norm: float64 (R,), of the weight, as the step left them.
        kind: "swn", "ewn" or "unit".

    Returns: a dict of new float64 tensors (R,): "radius" (signed) and "norm", ‖v‖, after the step; "radial_gradient"
        ⟨G, θ⟩ and "tangential_gradient" ‖G − ⟨G, θ⟩θ‖ of the gradient that the step took, θ = v/‖v‖; "angular_update",
        the angle between v before and after, in radians.

    Raises: ValueError for another kind, or for shapes that do not fit.
    """
    if kind not in ("swn", "ewn", "unit"):
        raise ValueError(f"kind must be 'swn', 'ewn' or 'unit', got {kind!r}")
    rows = radius.shape
    if len(rows) != 1 or norm.shape != rows or table.shape != (*rows, 4):
        raise ValueError("table must be (R, 4), radius and norm (R,), got "
                         f"{tuple(table.shape)}, {tuple(rows)} and {tuple(norm.shape)}")
    radial, tangential, across_square, along = table.unbind(1)
    return {
        "radius": radius.exp() if kind == "ewn" else radius.clone(),
        "norm": norm.clone(),
        "radial_gradient": radial.clone(),
        "tangential_gradient": tangential.clone(),
        "angular_update": torch.atan2(across_square.sqrt(), along),
    }
