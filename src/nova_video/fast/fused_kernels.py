# mypy: ignore-errors
# ruff: noqa: N803
"""The Triton kernels of the fused denoiser loop. `fused.py` launches them and alone imports this module.

Three kernels make a step: `turn` ends one step and begins the next (one program a token), `linear` computes a tile of
one of a block's two matrix products, `enter` is what lies between two blocks (one program a row). EARLY: a kernel is
launched while the one before still runs, and reads what it can before it waits for it.

Legend: row = pass * tokens + token, R = passes * tokens rows; W width; P values of a token. The residual stream x
(R, W), the branch h (splits, R, W) before its bias and norm, and the tokens' values are float32; the matrix products'
inputs y and g (R, W) have the weights' dtype. All arithmetic outside the matrix products is float32. What belongs
together travels as a tuple: `out` of a block is (fc2's bias, norm2's weight, norm2's bias), `ends` (head's weight and
bias, embedding's weight and bias), `state` (values, x, y, h, the data that the step before predicted), `update` (rows
of `linear_step`, the passes' weights, the noise of the first steps, how many these are).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Device functions -----------------------------------------------------------------------------------------------------


@triton.jit
def normalise(x, inside, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """Layer norm without weights of one row (W,), padded to a power of two."""
    mean = tl.sum(tl.where(inside, x, 0.0), 0) / WIDTH
    centred = tl.where(inside, x - mean, 0.0)
    return centred / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + EPS)


@triton.jit
def read(pointer, columns, inside):
    return tl.load(pointer + columns, mask=inside, other=0.0)


@triton.jit
def modulate(x, modulation, inside, WIDTH: tl.constexpr):
    """LN(x) (1 + scale) + shift of one row; `modulation` is (scale, shift)."""
    scale, shift = modulation
    return normalise(x, inside, WIDTH, 1e-6) * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)


@triton.jit
def leave(row, rows, x, h, out, gate, columns, inside, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """The residual stream of a row behind a block: x + gate * LN(h + bias), h summed over its splits; `out` is read."""
    bias, norm_weight, norm_bias = out
    stream = read(x + row * WIDTH, columns, inside)
    branch = bias.to(tl.float32)
    for split in tl.static_range(SPLITS):
        branch += read(h + (split * rows + row) * WIDTH, columns, inside)
    branch = normalise(branch, inside, WIDTH, 1e-5) * norm_weight.to(tl.float32) + norm_bias.to(tl.float32)
    return stream + gate.to(tl.float32) * branch


@triton.jit
def predict(
    row, rows, x, h, out, known, to_values, columns, inside, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The denoiser's output for a row (P,): residual behind the last block, last norm, head."""
    gate, modulation, _ = known
    head, head_bias = to_values
    stream = leave(row, rows, x, h, out, gate, columns, inside, WIDTH, SPLITS)
    own = modulate(stream, modulation, inside, WIDTH)
    return tl.sum(head.to(tl.float32) * own[None, :], 1) + head_bias.to(tl.float32)


@triton.jit
def release_kernel_behind(EARLY: tl.constexpr):
    """Let the next kernel start while this one runs. Its reads before it waits for this one cost no time."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def await_kernel_before(EARLY: tl.constexpr):
    """Wait until the kernel before has ended, and so all before it: it waited, too."""
    if EARLY:
        gdc_wait()


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "step", "following"])
def turn_kernel(
    tokens, step, following, state, update, clip, out, ends, left, last, entered,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr,
    PASSES: tl.constexpr, SPLITS: tl.constexpr, END: tl.constexpr, CLIP: tl.constexpr, MULTISTEP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One token in all its passes between two steps; without END, before the first.

    END: head, guidance and the scheduler's update of `step`. Then embedding, norm and modulation of the step behind,
    `following`. `left`, `last` and `entered` are modulations: of the last block, the last norm and the first block.
    """
    release_kernel_behind(EARLY)
    token = tl.program_id(0)
    rows = tokens * PASSES
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    value = tl.arange(0, PADDED_VALUES)
    valid = value < VALUES
    bias, norm_weight, norm_bias = out
    head, head_bias, embed, embed_bias = ends
    branch = (read(bias, columns, inside), read(norm_weight, columns, inside), read(norm_bias, columns, inside))
    passes = ()
    for index in tl.static_range(PASSES):
        row = step * rows + index * tokens + token
        next_row = following * rows + index * tokens + token
        passes = passes + (  # noqa: RUF005
            (
                read(left + row * 3 * WIDTH + 2 * WIDTH, columns, inside),
                (read(last + row * 2 * WIDTH, columns, inside), read(last + row * 2 * WIDTH + WIDTH, columns, inside)),
                (
                    read(entered + next_row * 3 * WIDTH, columns, inside),
                    read(entered + next_row * 3 * WIDTH + WIDTH, columns, inside),
                ),
            ),
        )
    head_at = value[:, None] * WIDTH + columns[None, :]  # (P, W)
    to_values = (read(head, head_at, valid[:, None] & inside[None, :]), read(head_bias, value, valid))
    embed_at = columns[:, None] * VALUES + value[None, :]  # (W, P)
    from_values = read(embed, embed_at, inside[:, None] & valid[None, :])
    offset = read(embed_bias, columns, inside)
    await_kernel_before(EARLY)
    values, x, y, h, before = state
    noisy = read(values + token * VALUES, value, valid)  # (P,)
    if END:
        rows_of_steps, weights, fresh, drawn = update
        guided = predict(token, rows, x, h, branch, passes[0], to_values, columns, inside, WIDTH, SPLITS)
        if PASSES > 1:
            guided *= tl.load(weights)
        for index in tl.static_range(1, PASSES):
            row = index * tokens + token
            output = predict(row, rows, x, h, branch, passes[index], to_values, columns, inside, WIDTH, SPLITS)
            guided += tl.load(weights + index) * output
        numbers = rows_of_steps + step * 8  # as in `linear_step`
        data = tl.load(numbers + 5) * noisy + tl.load(numbers + 6) * guided
        if CLIP:
            noisy = tl.load(numbers + 3) * noisy + tl.load(numbers + 4) * tl.minimum(tl.maximum(data, -clip), clip)
        else:
            noisy = tl.load(numbers) * noisy + tl.load(numbers + 1) * guided
        noise = read(fresh + (step * tokens + token) * VALUES, value, valid & (step < drawn))
        noisy += tl.load(numbers + 2) * noise
        if MULTISTEP:
            noisy += tl.load(numbers + 7) * read(before + token * VALUES, value, valid)
            tl.store(before + token * VALUES + value, data, mask=valid)
        tl.store(values + token * VALUES + value, noisy, mask=valid)
    stream = tl.sum(from_values.to(tl.float32) * noisy[None, :], 1) + offset.to(tl.float32)  # (W,)
    for index in tl.static_range(PASSES):
        _, _, modulation = passes[index]
        own = (index * tokens + token) * WIDTH + columns
        tl.store(x + own, stream, mask=inside)
        tl.store(y + own, modulate(stream, modulation, inside, WIDTH).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "step"])
def enter_kernel(
    rows, step, state, out, left, entered,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A row between two blocks: x behind the first, y for the second; `left` and `entered` are their modulations."""
    release_kernel_behind(EARLY)
    row = tl.program_id(0)
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    bias, norm_weight, norm_bias = out
    own = (step * rows + row) * 3 * WIDTH
    branch = (read(bias, columns, inside), read(norm_weight, columns, inside), read(norm_bias, columns, inside))
    gate = read(left + own + 2 * WIDTH, columns, inside)
    modulation = (read(entered + own, columns, inside), read(entered + own + WIDTH, columns, inside))
    await_kernel_before(EARLY)
    _, x, y, h, _ = state
    stream = leave(row, rows, x, h, branch, gate, columns, inside, WIDTH, SPLITS)
    tl.store(x + row * WIDTH + columns, stream, mask=inside)
    modulated = modulate(stream, modulation, inside, WIDTH)
    tl.store(y + row * WIDTH + columns, modulated.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    a, weight, bias, to, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, HIDDEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A tile of a (R, W) @ weight (W, W)^T, over one of SPLITS parts of the sum.

    HIDDEN: silu(. + bias), in the weights' dtype; else the bare part of the sum into `to` (splits, R, W), float32.
    EARLY: all weights of the tile are read, into registers, before the wait.
    """
    release_kernel_behind(EARLY)
    tile = tl.program_id(0)
    column_tiles: tl.constexpr = WIDTH // COLUMNS
    chunks: tl.constexpr = WIDTH // DEPTH // SPLITS
    column = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    split = (tile // column_tiles) % SPLITS
    row = (tile // (column_tiles * SPLITS)) * ROWS + tl.arange(0, ROWS)
    depth = split * (chunks * DEPTH) + tl.arange(0, DEPTH)
    inside = row[:, None] < rows
    lefts = a + row[:, None] * WIDTH + depth[None, :]  # (ROWS, DEPTH)
    rights = weight + column[None, :] * WIDTH + depth[:, None]  # (DEPTH, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if EARLY:
        held = ()
        for chunk in tl.static_range(chunks):
            held = held + (tl.load(rights + chunk * DEPTH),)  # noqa: RUF005
        await_kernel_before(EARLY)
        read_ahead = ()
        for chunk in tl.static_range(chunks):  # all reads before the first product waits for any
            read_ahead = read_ahead + (tl.load(lefts + chunk * DEPTH, mask=inside, other=0.0),)  # noqa: RUF005
        second, third, fourth = total, total, total  # sums of their own do not wait for each other
        for chunk in tl.static_range(chunks):
            more = tl.dot(read_ahead[chunk], held[chunk], total, input_precision="ieee")
            total, second, third, fourth = second, third, fourth, more
        total = (total + second) + (third + fourth)
    else:
        for chunk in tl.range(chunks, num_stages=STAGES):
            left = tl.load(lefts + chunk * DEPTH, mask=inside, other=0.0)
            right = tl.load(rights + chunk * DEPTH)
            total = tl.dot(left, right, total, input_precision="ieee")
    at = row[:, None] * WIDTH + column[None, :]
    if HIDDEN:
        total += tl.load(bias + column).to(tl.float32)[None, :]
        total = total / (1.0 + tl.exp(-total))
        tl.store(to + at, total.to(to.dtype.element_ty), mask=inside)
    else:
        tl.store(to + split * rows * WIDTH + at, total, mask=inside)
