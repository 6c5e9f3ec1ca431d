# mypy: ignore-errors
# ruff: noqa: N803
"""The Triton kernels of the fused denoiser loop. `fused.py` launches them and alone imports this module.

Three pieces make a step: `turn` ends one step and begins the next (one program a token), `linear` computes a tile of
one of a block's two matrix products, `enter` is what lies between two blocks (one program a row). Each is a kernel of
its own, and `whole_loop` is one kernel that stays on the GPU for all of them.

Legend: row = pass * tokens + token, R = passes * tokens rows; W width; P values of a token. The residual stream x
(R, W), the branch h (splits, R, W) before its bias and norm, and the tokens' values are float32; the matrix products'
inputs y and g (R, W) have the weights' dtype. All arithmetic outside the matrix products is float32. What belongs
together travels as a tuple: `out` of a block is (fc2's bias, norm2's weight, norm2's bias), `ends` (head's weight and
bias, embedding's weight and bias), `state` (values, x, y, h), `update` (rows of `linear_step`, guidance's scales, the
noise of the first steps, how many these are).
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
def modulate(x, modulation, inside, columns, WIDTH: tl.constexpr):
    """LN(x) (1 + scale) + shift of one row; `modulation` points at the row's scale, the shift follows."""
    scale = tl.load(modulation + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(modulation + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    return normalise(x, inside, WIDTH, 1e-6) * (1.0 + scale) + shift


@triton.jit
def leave(row, rows, step, x, h, out, modulation, inside, columns, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """The residual stream of a row behind a block: x + gate * LN(h + bias), h summed over its splits."""
    bias, norm_weight, norm_bias = out
    branch = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLITS):
        branch += tl.load(h + (split * rows + row) * WIDTH + columns, mask=inside, other=0.0)
    weight = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
    branch = normalise(branch, inside, WIDTH, 1e-5) * weight + shift
    gate = tl.load(modulation + (step * rows + row) * 3 * WIDTH + 2 * WIDTH + columns, mask=inside, other=0.0)
    return tl.load(x + row * WIDTH + columns, mask=inside, other=0.0) + gate.to(tl.float32) * branch


@triton.jit
def enter(row, rows, step, state, out, left, entered, WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    """A row between two blocks: x behind the first, y for the second; `left` and `entered` are their modulations."""
    _, x, y, h = state
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    stream = leave(row, rows, step, x, h, out, left, inside, columns, WIDTH, SPLITS)
    tl.store(x + row * WIDTH + columns, stream, mask=inside)
    own = modulate(stream, entered + (step * rows + row) * 3 * WIDTH, inside, columns, WIDTH)
    tl.store(y + row * WIDTH + columns, own.to(y.dtype.element_ty), mask=inside)


@triton.jit
def hold(
    tile, weight, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The weights of a tile of `linear`, all at once, in registers."""
    chunks: tl.constexpr = WIDTH // DEPTH // SPLITS
    column = (tile % (WIDTH // COLUMNS)) * COLUMNS + tl.arange(0, COLUMNS)
    depth = (tile // (WIDTH // COLUMNS)) % SPLITS * (chunks * DEPTH) + tl.arange(0, DEPTH)
    held = ()
    for chunk in tl.static_range(chunks):
        held = held + (tl.load(weight + column[None, :] * WIDTH + chunk * DEPTH + depth[:, None]),)  # noqa: RUF005
    return held


@triton.jit
def linear(
    tile, a, weight, held, bias, to, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, HIDDEN: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """A tile of a (R, W) @ weight (W, W)^T, over one of SPLITS parts of the sum; HELD: with the weights of `hold`.

    HIDDEN: silu(. + bias), in the weights' dtype; else the bare part of the sum into `to` (splits, R, W), float32.
    """
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
    if HELD:
        read = ()
        for chunk in tl.static_range(chunks):  # all reads before the first product waits for any
            read = read + (tl.load(lefts + chunk * DEPTH, mask=inside, other=0.0),)  # noqa: RUF005
        for chunk in tl.static_range(chunks):
            total = tl.dot(read[chunk], held[chunk], total, input_precision="ieee")
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


@triton.jit
def predict(
    row, rows, step, x, h, out, ends, left, last, value, valid,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The denoiser's output for a row (P,): residual behind the last block, last norm, head."""
    head, head_bias, _, _ = ends
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    stream = leave(row, rows, step, x, h, out, left, inside, columns, WIDTH, SPLITS)
    own = modulate(stream, last + (step * rows + row) * 2 * WIDTH, inside, columns, WIDTH)
    both = valid[:, None] & inside[None, :]
    weight = tl.load(head + value[:, None] * WIDTH + columns[None, :], mask=both, other=0.0).to(tl.float32)
    return tl.sum(weight * own[None, :], 1) + tl.load(head_bias + value, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def turn(
    token, tokens, step, following, state, update, clip, out, ends, left, last, entered,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr,
    PASSES: tl.constexpr, SPLITS: tl.constexpr, END: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """One token in all its passes between two steps; without END, before the first.

    END: head, guidance and the scheduler's update of `step`. Then embedding, norm and modulation of step `following`.
    """
    values, x, y, h = state
    rows = tokens * PASSES
    value = tl.arange(0, PADDED_VALUES)
    valid = value < VALUES
    noisy = tl.load(values + token * VALUES + value, mask=valid, other=0.0)  # (P,)
    if END:
        rows_of_steps, scales, fresh, drawn = update
        guided = predict(
            token, rows, step, x, h, out, ends, left, last, value, valid, WIDTH, PADDED, SPLITS
        )  # fmt: skip
        if PASSES > 1:
            null = predict(
                tokens + token, rows, step, x, h, out, ends, left, last, value, valid, WIDTH, PADDED, SPLITS
            )  # fmt: skip
            if PASSES == 2:
                guided = null + tl.load(scales) * (guided - null)
            else:
                image = predict(
                    2 * tokens + token, rows, step, x, h, out, ends, left, last, value, valid, WIDTH, PADDED, SPLITS
                )  # fmt: skip
                guided = null + tl.load(scales) * (guided - image) + tl.load(scales + 1) * (image - null)
        row = rows_of_steps + step * 8  # as in `linear_step`
        if CLIP:
            data = tl.load(row + 5) * noisy + tl.load(row + 6) * guided
            noisy = tl.load(row + 3) * noisy + tl.load(row + 4) * tl.minimum(tl.maximum(data, -clip), clip)
        else:
            noisy = tl.load(row) * noisy + tl.load(row + 1) * guided
        noise = tl.load(fresh + (step * tokens + token) * VALUES + value, mask=valid & (step < drawn), other=0.0)
        noisy += tl.load(row + 2) * noise
        tl.store(values + token * VALUES + value, noisy, mask=valid)
    _, _, embed, embed_bias = ends
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    both = inside[:, None] & valid[None, :]
    weight = tl.load(embed + columns[:, None] * VALUES + value[None, :], mask=both, other=0.0).to(tl.float32)
    stream = tl.sum(weight * noisy[None, :], 1)  # (W,)
    stream += tl.load(embed_bias + columns, mask=inside, other=0.0).to(tl.float32)
    for index in tl.static_range(PASSES):
        row = index * tokens + token
        tl.store(x + row * WIDTH + columns, stream, mask=inside)
        begun = modulate(stream, entered + (following * rows + row) * 3 * WIDTH, inside, columns, WIDTH)
        tl.store(y + row * WIDTH + columns, begun.to(y.dtype.element_ty), mask=inside)


# Each piece as a kernel of its own ------------------------------------------------------------------------------------


@triton.jit
def release_kernel_behind(DEPENDENT: tl.constexpr):
    """Let the next kernel be launched while this one runs: what it reads before it awaits this one costs no time."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def await_kernel_before(DEPENDENT: tl.constexpr):
    """Wait until the kernel before has ended, and so all before it: it waited, too."""
    if DEPENDENT:
        gdc_wait()


@triton.jit(do_not_specialize=["tokens", "step", "following"])
def turn_kernel(
    tokens, step, following, state, update, clip, out, ends, left, last, entered,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr,
    PASSES: tl.constexpr, SPLITS: tl.constexpr, END: tl.constexpr, CLIP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    release_kernel_behind(DEPENDENT)
    await_kernel_before(DEPENDENT)
    turn(
        tl.program_id(0), tokens, step, following, state, update, clip, out, ends, left, last, entered,
        WIDTH, PADDED, VALUES, PADDED_VALUES, PASSES, SPLITS, END, CLIP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "step"])
def enter_kernel(
    rows, step, state, out, left, entered,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release_kernel_behind(DEPENDENT)
    await_kernel_before(DEPENDENT)
    enter(tl.program_id(0), rows, step, state, out, left, entered, WIDTH, PADDED, SPLITS)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    a, weight, bias, to, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, HIDDEN: tl.constexpr,
    HELD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release_kernel_behind(DEPENDENT)
    tile = tl.program_id(0)
    held = ()
    if HELD:  # weights depend on no kernel: they are read while the one before still runs
        held = hold(tile, weight, WIDTH, COLUMNS, DEPTH, SPLITS)
    await_kernel_before(DEPENDENT)
    linear(tile, a, weight, held, bias, to, rows, WIDTH, ROWS, COLUMNS, DEPTH, SPLITS, STAGES, HIDDEN, HELD)


# All of them in one ---------------------------------------------------------------------------------------------------


@triton.jit
def meet(counter, arrivals):
    """Wait until all programs have come here: each adds one, and the sum is `arrivals` when all have."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acq_rel", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def meet_and_multiply(
    counter, arrivals, a, weight, bias, to, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, HIDDEN: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """All tiles of a matrix product, behind a meeting; HELD: there are no more tiles than programs."""
    program = tl.program_id(0)
    tiles = (WIDTH // COLUMNS) * tl.cdiv(rows, ROWS) * SPLITS
    if HELD:  # while the others come
        held = hold(program, weight, WIDTH, COLUMNS, DEPTH, SPLITS)
        meet(counter, arrivals)
        if program < tiles:
            linear(program, a, weight, held, bias, to, rows, WIDTH, ROWS, COLUMNS, DEPTH, SPLITS, STAGES, HIDDEN, HELD)
    else:
        meet(counter, arrivals)
        for tile in range(program, tiles, tl.num_programs(0)):
            linear(tile, a, weight, (), bias, to, rows, WIDTH, ROWS, COLUMNS, DEPTH, SPLITS, STAGES, HIDDEN, HELD)


@triton.jit(do_not_specialize=["tokens", "steps"])
def whole_loop(
    counter, tokens, steps, state, g, update, clip, blocks, ends, modulations,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr,
    PASSES: tl.constexpr, BLOCKS: tl.constexpr, CLIP: tl.constexpr,
    ROWS1: tl.constexpr, COLUMNS1: tl.constexpr, DEPTH1: tl.constexpr, STAGES1: tl.constexpr, HELD1: tl.constexpr,
    ROWS2: tl.constexpr, COLUMNS2: tl.constexpr, DEPTH2: tl.constexpr, STAGES2: tl.constexpr, HELD2: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The whole loop, by programs that are all on the GPU at once (a cooperative launch) and meet between its pieces.

    A block of `blocks` is (fc1's weight, its bias, fc2's weight, out); `modulations` has one more, the last norm's.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    rows = tokens * PASSES
    _, _, y, h = state
    _, _, _, out = blocks[BLOCKS - 1]
    for token in range(program, tokens, programs):
        turn(
            token, tokens, 0, 0, state, update, clip, out, ends, modulations[BLOCKS - 1], modulations[BLOCKS],
            modulations[0], WIDTH, PADDED, VALUES, PADDED_VALUES, PASSES, SPLITS, False, CLIP,
        )  # fmt: skip
    arrivals = 0
    for step in range(steps):
        for block in tl.static_range(BLOCKS):
            fc1, bias, fc2, _ = blocks[block]
            if block > 0:
                _, _, _, before = blocks[block - 1]
                arrivals += programs
                meet(counter, arrivals)
                for row in range(program, rows, programs):
                    enter(
                        row, rows, step, state, before, modulations[block - 1], modulations[block],
                        WIDTH, PADDED, SPLITS,
                    )  # fmt: skip
            arrivals += programs
            meet_and_multiply(
                counter, arrivals, y, fc1, bias, g, rows, WIDTH, ROWS1, COLUMNS1, DEPTH1, 1, STAGES1, True, HELD1
            )  # fmt: skip
            arrivals += programs
            meet_and_multiply(
                counter, arrivals, g, fc2, bias, h, rows, WIDTH, ROWS2, COLUMNS2, DEPTH2, SPLITS, STAGES2, False, HELD2
            )  # fmt: skip
        arrivals += programs
        meet(counter, arrivals)
        for token in range(program, tokens, programs):
            turn(
                token, tokens, step, tl.minimum(step + 1, steps - 1), state, update, clip, out, ends,
                modulations[BLOCKS - 1], modulations[BLOCKS], modulations[0],
                WIDTH, PADDED, VALUES, PADDED_VALUES, PASSES, SPLITS, True, CLIP,
            )  # fmt: skip
