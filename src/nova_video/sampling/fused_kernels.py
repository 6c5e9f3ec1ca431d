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
def read_for_enter(row, rows, step, out, left, entered, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """What `enter` needs that is known before the loop."""
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    bias, norm_weight, norm_bias = out
    own = (step * rows + row) * 3 * WIDTH
    branch = (read(bias, columns, inside), read(norm_weight, columns, inside), read(norm_bias, columns, inside))
    gate = read(left + own + 2 * WIDTH, columns, inside)
    return branch, gate, (read(entered + own, columns, inside), read(entered + own + WIDTH, columns, inside))


@triton.jit
def enter(row, rows, state, known, WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr):
    """A row between two blocks: x behind the first, y for the second."""
    _, x, y, h = state
    out, gate, modulation = known
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    stream = leave(row, rows, x, h, out, gate, columns, inside, WIDTH, SPLITS)
    tl.store(x + row * WIDTH + columns, stream, mask=inside)
    own = modulate(stream, modulation, inside, WIDTH)
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


@triton.jit
def read_for_turn(
    token, tokens, step, following, out, ends, left, last, entered,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """What `turn` needs that is known before the loop, but for the smallest; `left`, `last` and `entered` are the
    modulations of the last block, of the last norm and of the first block."""
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    value = tl.arange(0, PADDED_VALUES)
    valid = value < VALUES
    bias, norm_weight, norm_bias = out
    head, head_bias, embed, embed_bias = ends
    branch = (read(bias, columns, inside), read(norm_weight, columns, inside), read(norm_bias, columns, inside))
    passes = ()
    for index in tl.static_range(PASSES):
        row = step * tokens * PASSES + index * tokens + token
        next_row = following * tokens * PASSES + index * tokens + token
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
    head_tile = read(head, value[:, None] * WIDTH + columns[None, :], valid[:, None] & inside[None, :])  # (P, W)
    embed_tile = read(embed, columns[:, None] * VALUES + value[None, :], inside[:, None] & valid[None, :])  # (W, P)
    weights = (head_tile, read(head_bias, value, valid), embed_tile, read(embed_bias, columns, inside))
    return branch, passes, weights


@triton.jit
def predict(
    row, rows, x, h, out, known, weights, columns, inside, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The denoiser's output for a row (P,): residual behind the last block, last norm, head."""
    gate, modulation, _ = known
    head, head_bias, _, _ = weights
    stream = leave(row, rows, x, h, out, gate, columns, inside, WIDTH, SPLITS)
    own = modulate(stream, modulation, inside, WIDTH)
    return tl.sum(head.to(tl.float32) * own[None, :], 1) + head_bias.to(tl.float32)


@triton.jit
def turn(
    token, tokens, step, state, update, clip, known,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUES: tl.constexpr, PADDED_VALUES: tl.constexpr,
    PASSES: tl.constexpr, SPLITS: tl.constexpr, END: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """One token in all its passes between two steps; without END, before the first.

    END: head, guidance and the scheduler's update of `step`. Then embedding, norm and modulation of the step behind.
    """
    values, x, y, h = state
    out, passes, weights = known
    rows = tokens * PASSES
    columns = tl.arange(0, PADDED)
    inside = columns < WIDTH
    value = tl.arange(0, PADDED_VALUES)
    valid = value < VALUES
    noisy = read(values + token * VALUES, value, valid)  # (P,)
    if END:
        rows_of_steps, scales, fresh, drawn = update
        guided = predict(token, rows, x, h, out, passes[0], weights, columns, inside, WIDTH, SPLITS)
        if PASSES > 1:
            null = predict(tokens + token, rows, x, h, out, passes[1], weights, columns, inside, WIDTH, SPLITS)
            if PASSES == 2:
                guided = null + tl.load(scales) * (guided - null)
            else:
                image = predict(2 * tokens + token, rows, x, h, out, passes[2], weights, columns, inside, WIDTH, SPLITS)
                guided = null + tl.load(scales) * (guided - image) + tl.load(scales + 1) * (image - null)
        row = rows_of_steps + step * 8  # as in `linear_step`
        if CLIP:
            data = tl.load(row + 5) * noisy + tl.load(row + 6) * guided
            noisy = tl.load(row + 3) * noisy + tl.load(row + 4) * tl.minimum(tl.maximum(data, -clip), clip)
        else:
            noisy = tl.load(row) * noisy + tl.load(row + 1) * guided
        noise = read(fresh + (step * tokens + token) * VALUES, value, valid & (step < drawn))
        noisy += tl.load(row + 2) * noise
        tl.store(values + token * VALUES + value, noisy, mask=valid)
    _, _, embed, embed_bias = weights
    stream = tl.sum(embed.to(tl.float32) * noisy[None, :], 1) + embed_bias.to(tl.float32)  # (W,)
    for index in tl.static_range(PASSES):
        _, _, modulation = passes[index]
        own = (index * tokens + token) * WIDTH + columns
        tl.store(x + own, stream, mask=inside)
        tl.store(y + own, modulate(stream, modulation, inside, WIDTH).to(y.dtype.element_ty), mask=inside)


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
    PASSES: tl.constexpr, SPLITS: tl.constexpr, END: tl.constexpr, CLIP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release_kernel_behind(DEPENDENT)
    token = tl.program_id(0)
    known = read_for_turn(
        token, tokens, step, following, out, ends, left, last, entered, WIDTH, PADDED, VALUES, PADDED_VALUES, PASSES
    )  # fmt: skip
    await_kernel_before(DEPENDENT)
    turn(
        token, tokens, step, state, update, clip, known,
        WIDTH, PADDED, VALUES, PADDED_VALUES, PASSES, SPLITS, END, CLIP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "step"])
def enter_kernel(
    rows, step, state, out, left, entered,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release_kernel_behind(DEPENDENT)
    row = tl.program_id(0)
    known = read_for_enter(row, rows, step, out, left, entered, WIDTH, PADDED)
    await_kernel_before(DEPENDENT)
    enter(row, rows, state, known, WIDTH, PADDED, SPLITS)


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
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < arrivals:
        arrived = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter], dtype=tl.int32, is_pure=False, pack=1
        )
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
    left, last, entered = modulations[BLOCKS - 1], modulations[BLOCKS], modulations[0]
    for token in range(program, tokens, programs):
        known = read_for_turn(
            token, tokens, 0, 0, out, ends, left, last, entered, WIDTH, PADDED, VALUES, PADDED_VALUES, PASSES
        )  # fmt: skip
        turn(
            token, tokens, 0, state, update, clip, known,
            WIDTH, PADDED, VALUES, PADDED_VALUES, PASSES, SPLITS, False, CLIP,
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
                    own = read_for_enter(
                        row, rows, step, before, modulations[block - 1], modulations[block], WIDTH, PADDED
                    )  # fmt: skip
                    enter(row, rows, state, own, WIDTH, PADDED, SPLITS)
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
        following = tl.minimum(step + 1, steps - 1)
        for token in range(program, tokens, programs):
            known = read_for_turn(
                token, tokens, step, following, out, ends, left, last, entered,
                WIDTH, PADDED, VALUES, PADDED_VALUES, PASSES,
            )  # fmt: skip
            turn(
                token, tokens, step, state, update, clip, known,
                WIDTH, PADDED, VALUES, PADDED_VALUES, PASSES, SPLITS, True, CLIP,
            )  # fmt: skip
