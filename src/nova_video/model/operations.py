"""Operations of the network's parts, two a multiply-add, counted from shapes: what sampling and training count with.

Only dense products and attention count; norms, activations and positions count for nothing.
"""


def linear(count: int, inputs: int, outputs: int) -> float:
    """Operations of a matrix product on `count` tokens."""
    return 2.0 * count * inputs * outputs


def attention(pairs: int, width: int) -> float:
    """Operations of both products of attention, over all heads, for `pairs` of a query and a key."""
    return 4.0 * pairs * width


def block(queries: int, keys: int, width: int) -> float:
    """Operations of a transformer block on one row: 12 D^2 weights a token, and attention."""
    return linear(queries, width, 12 * width) + attention(queries * keys, width)
