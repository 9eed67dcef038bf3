"""Elementary functions and activations inside Triton kernels, in float32.

With PRECISE they are as exact as torch's own (about one unit in the last place), which a float32
result shows; without it they use the hardware's fast exponential and division, whose error of a few
float32 units disappears in the rounding to 16 bits.

``value`` and ``value_and_slope`` are the activations of ``activations``; ``beta`` is the slope
parameter of "swish" and is not read otherwise. An activation that is text is walked instruction by
instruction while the kernel is compiled. The complement 1 - sigmoid(x) is sigmoid(-x), which
costs one product and does not cancel.
"""

from __future__ import annotations

import math

from fusewright.kernels.launch import tl, triton

SQRT_HALF = math.sqrt(0.5)
INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
GELU_K = math.sqrt(2.0 / math.pi)
GELU_A = 0.044715
QUICK = 1.702

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2_HIGH = tl.constexpr(0.693145751953125)  # 16 bits: its product with an integer is exact
_LN_2_LOW = tl.constexpr(1.4286068203094173e-06)
_SQRT_HALF = tl.constexpr(SQRT_HALF)
_INV_SQRT_2PI = tl.constexpr(INV_SQRT_2PI)
_TWO_K = tl.constexpr(2.0 * GELU_K)
_A = tl.constexpr(GELU_A)
_SIX_K_A = tl.constexpr(6.0 * GELU_K * GELU_A)
_QUICK = tl.constexpr(QUICK)
# In the code a constant stands right of a tensor: the interpreter multiplies no constexpr by one.
# tanh(x) = x + x^3 P(x^2) for |x| <= 0.61 to 1.3e-8, from interpolation in Chebyshev's nodes
_T0 = tl.constexpr(-0.333333298322908)
_T1 = tl.constexpr(0.1333286147064441)
_T2 = tl.constexpr(-0.053865198067144196)
_T3 = tl.constexpr(0.021066630889577345)
_T4 = tl.constexpr(-0.00620025785058246)


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """e^x; PRECISE reduces the argument first, so that its product with log2 e loses nothing."""
    if PRECISE:
        # Clamped, so that infinities survive the reduction; exp is 0 or inf beyond.
        x = tl.minimum(tl.maximum(x, -110.0, tl.PropagateNan.ALL), 110.0, tl.PropagateNan.ALL)
        n = tl.floor(x * _LOG2_E + 0.5)
        r = tl.fma(-n, _LN_2_LOW, tl.fma(-n, _LN_2_HIGH, x))
        half = tl.floor(n * 0.5)  # 2^n may leave float32's range where its two halves do not
        result = tl.exp2(r * _LOG2_E) * tl.exp2(half) * tl.exp2(n - half)
    else:
        result = tl.exp2(x * _LOG2_E)  # tl.exp keeps subnormal results, for three operations more
    return result


@triton.jit
def divide(a, b, PRECISE: tl.constexpr):
    """a / b, rounded to nearest with PRECISE."""
    return tl.div_rn(a, b) if PRECISE else a / b


@triton.jit
def sigmoids(x, PRECISE: tl.constexpr):
    """sigmoid(x) and sigmoid(-x)."""
    e = exp(-tl.abs(x), PRECISE)
    near_one = divide(1.0, 1.0 + e, PRECISE)
    near_zero = e * near_one
    return tl.where(x >= 0, near_one, near_zero), tl.where(x >= 0, near_zero, near_one)


@triton.jit
def tanh_and_slope(x, PRECISE: tl.constexpr):
    """tanh(x) and 1 - tanh(x)^2, neither by a difference that cancels much."""
    a = tl.abs(x)
    e = exp(-2.0 * a, PRECISE)
    w = 2.0 * divide(e, 1.0 + e, PRECISE)  # 1 - tanh(a)
    u = x * x
    near = a + a * u * ((((u * _T4 + _T3) * u + _T2) * u + _T1) * u + _T0)
    is_near = a < 0.6
    t = tl.where(is_near, near, 1.0 - w)
    return tl.where(x < 0, -t, t), tl.where(is_near, 1.0 - near * near, w * (2.0 - w))


@triton.jit
def expm1(x, PRECISE: tl.constexpr):
    """e^x - 1; near zero as 2 t / (1 - t) with t = tanh(x / 2), where the difference would cancel."""
    t, _ = tanh_and_slope(x * 0.5, PRECISE)
    return tl.where(tl.abs(x) < 1.0, divide(t + t, 1.0 - t, PRECISE), exp(x, PRECISE) - 1.0)


@triton.jit
def softplus(x, PRECISE: tl.constexpr):
    """log(1 + e^x) as max(x, 0) + log1p(e), e = exp(-|x|).

    log1p(e) is log(u) e / (u - 1) with u = 1 + e rounded: the factor undoes the rounding of u.
    """
    e = exp(-tl.abs(x), PRECISE)
    u = 1.0 + e
    lost = u == 1.0
    tail = tl.where(lost, e, divide(tl.log(u) * e, tl.where(lost, 1.0, u - 1.0), PRECISE))
    return tl.where(x > 0, x, tl.where(x <= 0, 0.0, x)) + tail


# What a compiling kernel may call: Triton follows every global function that these name, and would
# refuse the parser, so it is imported where it is called.
@triton.constexpr_function
def _steps(text, part):
    """How many instructions the text has."""
    from fusewright.kernels.expressions import program

    return len(program(text, part).steps)


@triton.constexpr_function
def _operation(text, part, at):
    from fusewright.kernels.expressions import program

    return program(text, part).steps[at].operation


@triton.constexpr_function
def _operand(text, part, at, which):
    """The number of an instruction's operand; of one that it has not, 0."""
    from fusewright.kernels.expressions import program

    operands = program(text, part).steps[at].operands
    return operands[which] if which < len(operands) else 0


@triton.constexpr_function
def _constant(text, part, at):
    from fusewright.kernels.expressions import program

    return program(text, part).steps[at].constant


@triton.constexpr_function
def _result(text, part, which):
    from fusewright.kernels.expressions import program

    return program(text, part).results[which]


@triton.constexpr_function
def _is_expression(activation):
    return ";" in activation


@triton.constexpr_function
def _has_up(activation):
    return activation.count(";") == 3


@triton.jit
def _apply(a, b, c, OPERATION: tl.constexpr, CONSTANT: tl.constexpr, PRECISE: tl.constexpr):
    """One instruction of a text."""
    if OPERATION == "const":
        y = tl.full(a.shape, CONSTANT, tl.float32)
    elif OPERATION == "neg":
        y = -a
    elif OPERATION == "add":
        y = a + b
    elif OPERATION == "sub":
        y = a - b
    elif OPERATION == "mul":
        y = a * b
    elif OPERATION == "div":
        y = divide(a, b, PRECISE)
    elif OPERATION == "exp":
        y = exp(a, PRECISE)
    elif OPERATION == "log":
        y = tl.log(a)
    elif OPERATION == "sqrt":
        y = tl.sqrt_rn(a) if PRECISE else tl.sqrt(a)
    elif OPERATION == "abs":
        y = tl.abs(a)
    elif OPERATION == "tanh":
        y, _ = tanh_and_slope(a, PRECISE)
    elif OPERATION == "erf":
        y = tl.erf(a)
    elif OPERATION == "expm1":
        y = expm1(a, PRECISE)
    elif OPERATION == "sigmoid":
        y, _ = sigmoids(a, PRECISE)
    elif OPERATION == "softplus":
        y = softplus(a, PRECISE)
    elif OPERATION == "relu":
        y = tl.where(a <= 0, 0.0, a)
    elif OPERATION == "least":
        y = tl.where(a < b, b, a)
    elif OPERATION == "most":
        y = tl.where(a > b, b, a)
    elif OPERATION == "where":
        y = tl.where(a > 0, b, c)
    else:
        tl.static_assert(OPERATION == "since")
        y = tl.where(a >= 0, b, c)
    return y


@triton.jit
def evaluate(x, TEXT: tl.constexpr, PART: tl.constexpr, PRECISE: tl.constexpr):
    """Both expressions of a part of the text; the loop is gone when the kernel is compiled."""
    values = (x,)
    for at in tl.static_range(_steps(TEXT, PART)):
        a = values[_operand(TEXT, PART, at, 0)]
        b = values[_operand(TEXT, PART, at, 1)]
        c = values[_operand(TEXT, PART, at, 2)]
        y = _apply(a, b, c, _operation(TEXT, PART, at), _constant(TEXT, PART, at), PRECISE)
        values = values + (y,)
    return values[_result(TEXT, PART, 0)], values[_result(TEXT, PART, 1)]


@triton.jit
def value_and_slope(x, beta, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr):
    """act(x) and act'(x)."""
    if _is_expression(ACTIVATION):
        y, slope = evaluate(x, ACTIVATION, 0, PRECISE)
        return y, slope
    elif ACTIVATION == "silu":
        s, c = sigmoids(x, PRECISE)
        return x * s, s * (1.0 + x * c)
    elif ACTIVATION == "swish":
        s, c = sigmoids(beta * x, PRECISE)
        return x * s, s * (1.0 + beta * x * c)
    elif ACTIVATION == "quick_gelu":
        s, c = sigmoids(x * _QUICK, PRECISE)
        return x * s, s * (1.0 + x * _QUICK * c)
    elif ACTIVATION == "gelu":
        phi = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        return x * phi, phi + x * (exp(-0.5 * x * x, PRECISE) * _INV_SQRT_2PI)
    elif ACTIVATION == "gelu_tanh":
        # Beyond 16 the sigmoid is 0 or 1 exactly, and the clamp keeps x^3 finite.
        v = tl.minimum(tl.maximum(x, -16.0, tl.PropagateNan.ALL), 16.0, tl.PropagateNan.ALL)
        s, c = sigmoids((v + v * v * v * _A) * _TWO_K, PRECISE)
        return x * s, s * (1.0 + v * c * (v * v * _SIX_K_A + _TWO_K))
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        positive = tl.where(x <= 0, 0.0, x)
        return positive * positive, 2.0 * positive
    elif ACTIVATION == "sigmoid":
        s, c = sigmoids(x, PRECISE)
        return s, s * c
    elif ACTIVATION == "tanh":
        t, slope = tanh_and_slope(x, PRECISE)
        return t, slope
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def value(x, beta, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr):
    """act(x); what only the slope needs is dropped by the compiler."""
    y, _ = value_and_slope(x, beta, ACTIVATION, PRECISE)
    return y


@triton.jit
def up_and_slope(up, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr):
    """h(up) and h'(up) of a gated unit whose text has them; otherwise up and 1."""
    if _has_up(ACTIVATION):
        h, slope = evaluate(up, ACTIVATION, 1, PRECISE)
        return h, slope
    else:
        return up, tl.full(up.shape, 1.0, tl.float32)
