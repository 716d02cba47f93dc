# mypy: disallow-untyped-defs=False
"""Triton kernels of `row_attention`: a program holds a tile of tokens that follow each other in the row. Needs triton.

What a query may read is one run of keys [low, high): its text, cut off by the window. What reads a key is a run of
queries just the same. So a tile of several short texts is as full as one inside a long text, and every mask is two
comparisons. Scores are in units of log 2, because the hardware has 2^x and no e^x.

T tokens, H query heads, G key and value heads, D numbers a head, R distances of the bias. Optional pointers are None,
and what belongs to them is then not compiled.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
# Scores begin below any that occurs, yet finite: a tile may hold no key for a query, and inf - inf is not a number.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _load_rows(states, first, stride, stop, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row, column = first + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = (row < stop)[:, None]
    if BLOCK > D:
        real = real & (column < D)[None, :]
    # 64 bits: a long row of tokens times the numbers of each passes 2**31.
    return tl.load(states + row.to(tl.int64)[:, None] * stride + column[None, :], mask=real, other=0.0)


@triton.jit
def _store_rows(states, values, first, stride, stop, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    row, column = first + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = (row < stop)[:, None] & (column < D)[None, :]
    tl.store(states + row.to(tl.int64)[:, None] * stride + column[None, :], values, mask=real)


@triton.jit
def _reach(starts, ends, first, before, after, tokens, ROWS: tl.constexpr):
    # For each token of a tile the run [low, high) at most `before` before and `after` behind it in its text; for all of
    # them together [begin, stop). Tokens past the end of the row have an empty run.
    row = first + tl.arange(0, ROWS)
    low = tl.maximum(tl.load(starts + row, mask=row < tokens, other=0), row - before)
    high = tl.minimum(tl.load(ends + row, mask=row < tokens, other=0), row + after + 1)
    last = tl.minimum(first + ROWS, tokens) - 1
    begin = tl.maximum(tl.load(starts + first), first - before)
    stop = tl.minimum(tl.load(ends + last), last + after + 1)
    return low, high, begin, stop


@triton.jit
def _scramble(number):
    # The finaliser of MurmurHash3: every bit of a uint32 moves every bit of the result.
    number = (number ^ (number >> 16)) * 0x85EBCA6B
    number = (number ^ (number >> 13)) * 0xC2B2AE35
    return number ^ (number >> 16)


@triton.jit
def _dropout_keys(seed, head):
    # Two random numbers for a head: one for its queries, one for its keys.
    number = tl.load(seed)
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    query_key = _scramble(low + _scramble(high + _scramble((head + 1).to(tl.uint32))))
    return query_key, _scramble(query_key + 0x9E3779B9)


@triton.jit
def _line(key, index):
    index = (key + index.to(tl.uint32)) * 0x85EBCA6B
    return (index ^ (index >> 13)) * 0xC2B2AE35


@triton.jit
def _kept(line_M, line_N, threshold):
    # Hashes of rows and of columns, one scrambling step for each pair: Philox would cost more than the attention.
    bits = line_M[:, None] + line_N[None, :]
    bits = (bits ^ (bits >> 16)) * 0x2C1B3C6D
    return bits.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _bias_column(distance, distances):
    return tl.minimum(tl.maximum(distance + distances // 2, 0), distances - 1)


@triton.jit
def _load_bias(bias_R, apart, sign, distances, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # The bias of a tile whose first column is the token `apart` behind that of its first row, in units of log 2; `sign`
    # is 1 where columns are keys, -1 where they are queries. A tile has one number for each of its diagonals: these
    # few are loaded, and the tile is read from them on the chip.
    LENGTH: tl.constexpr = 2 * (ROWS if ROWS > COLUMNS else COLUMNS)
    diagonal = apart + tl.arange(0, LENGTH) - (ROWS - 1)
    bias = tl.load(bias_R + _bias_column(sign * diagonal, distances)) * _LOG2_E
    place = tl.arange(0, COLUMNS)[None, :] - tl.arange(0, ROWS)[:, None] + (ROWS - 1)
    return tl.gather(bias, place.reshape(ROWS * COLUMNS), 0).reshape(ROWS, COLUMNS)


@triton.jit(do_not_specialize=["tokens", "before", "after", "distances", "threshold"])
def attend(
    q_THD,
    k_TGD,
    v_TGD,
    starts_T,
    ends_T,
    bias_HR,
    seed,
    tokens,
    before,
    after,
    distances,
    scale,
    threshold,
    keep_scale,
    q_stride_T,
    q_stride_H,
    k_stride_T,
    k_stride_G,
    v_stride_T,
    v_stride_G,
    out_THD,
    lse_HT,
    out_stride_T,
    out_stride_H,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The output and, for the backward pass, log2 of each query's sum of 2^score."""
    head, first = tl.program_id(0), tl.program_id(1) * QUERIES
    k_T, v_T = k_TGD + head // GROUP * k_stride_G, v_TGD + head // GROUP * v_stride_G
    query = first + tl.arange(0, QUERIES)
    low, high, begin, stop = _reach(starts_T, ends_T, first, before, after, tokens, QUERIES)
    q = _load_rows(q_THD + head * q_stride_H, first, q_stride_T, tokens, QUERIES, D, BLOCK)
    if seed is not None:
        query_key, key_key = _dropout_keys(seed, head)
        query_line = _line(query_key, query)
    top = tl.full([QUERIES], _LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, BLOCK], tl.float32)
    for at in range(begin, stop, KEYS):
        key = at + tl.arange(0, KEYS)
        k = _load_rows(k_T, at, k_stride_T, stop, KEYS, D, BLOCK)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2_E)
        if bias_HR is not None:
            scores += _load_bias(bias_HR + head * distances, at - first, 1, distances, QUERIES, KEYS)
        scores = tl.where((key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        if seed is not None:
            weights = tl.where(_kept(query_line, _line(key_key, key), threshold), weights, 0.0)
        v = _load_rows(v_T, at, v_stride_T, stop, KEYS, D, BLOCK)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = higher
    real = query < tokens
    total = tl.where(real, total, 1.0)
    tl.store(lse_HT + head * tokens + query, top + tl.log2(total), mask=real)
    out = (out * (keep_scale / total)[:, None]).to(out_THD.dtype.element_ty)
    _store_rows(out_THD + head * out_stride_H, out, first, out_stride_T, tokens, QUERIES, D, BLOCK)


@triton.jit(do_not_specialize=["tokens", "before", "after", "distances", "threshold"])
def query_gradients(
    q_THD,
    k_TGD,
    v_TGD,
    starts_T,
    ends_T,
    bias_HR,
    seed,
    tokens,
    before,
    after,
    distances,
    scale,
    threshold,
    keep_scale,
    q_stride_T,
    q_stride_H,
    k_stride_T,
    k_stride_G,
    v_stride_T,
    v_stride_G,
    out_THD,
    out_grad_THD,
    lse_HT,
    delta_HT,
    q_grad_THD,
    bias_grad_HR,
    out_stride_T,
    out_stride_H,
    out_grad_stride_T,
    out_grad_stride_H,
    q_grad_stride_T,
    q_grad_stride_H,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradients of the queries and of the bias; and each query's delta = Σ out · out_grad, for the keys' turn."""
    head, first = tl.program_id(0), tl.program_id(1) * QUERIES
    k_T, v_T = k_TGD + head // GROUP * k_stride_G, v_TGD + head // GROUP * v_stride_G
    query = first + tl.arange(0, QUERIES)
    low, high, begin, stop = _reach(starts_T, ends_T, first, before, after, tokens, QUERIES)
    q = _load_rows(q_THD + head * q_stride_H, first, q_stride_T, tokens, QUERIES, D, BLOCK)
    out = _load_rows(out_THD + head * out_stride_H, first, out_stride_T, tokens, QUERIES, D, BLOCK)
    grad = _load_rows(out_grad_THD + head * out_grad_stride_H, first, out_grad_stride_T, tokens, QUERIES, D, BLOCK)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_HT + head * tokens + query, delta, mask=query < tokens)
    lse = tl.load(lse_HT + head * tokens + query, mask=query < tokens, other=0.0)
    if seed is not None:
        query_key, key_key = _dropout_keys(seed, head)
        query_line = _line(query_key, query)
    q_grad = tl.zeros([QUERIES, BLOCK], tl.float32)
    for at in range(begin, stop, KEYS):
        key = at + tl.arange(0, KEYS)
        k = _load_rows(k_T, at, k_stride_T, stop, KEYS, D, BLOCK)
        v = _load_rows(v_T, at, v_stride_T, stop, KEYS, D, BLOCK)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2_E)
        if bias_HR is not None:
            scores += _load_bias(bias_HR + head * distances, at - first, 1, distances, QUERIES, KEYS)
        readable = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        weights = tl.exp2(tl.where(readable, scores, float("-inf")) - lse[:, None])
        weights_grad = tl.dot(grad, tl.trans(v), input_precision="ieee")
        if seed is not None:
            kept = _kept(query_line, _line(key_key, key), threshold)
            weights_grad = tl.where(kept, weights_grad * keep_scale, 0.0)
        scores_grad = weights * (weights_grad - delta[:, None])
        if bias_grad_HR is not None:
            column = _bias_column(key[None, :] - query[:, None], distances)
            tl.atomic_add(bias_grad_HR + head * distances + column, scores_grad, mask=readable, sem="relaxed")
        q_grad = tl.dot(scores_grad.to(k.dtype), k, q_grad, input_precision="ieee")
    q_grad = (q_grad * scale).to(q_grad_THD.dtype.element_ty)
    _store_rows(q_grad_THD + head * q_grad_stride_H, q_grad, first, q_grad_stride_T, tokens, QUERIES, D, BLOCK)


@triton.jit(do_not_specialize=["tokens", "before", "after", "distances", "threshold"])
def key_value_gradients(
    q_THD,
    k_TGD,
    v_TGD,
    starts_T,
    ends_T,
    bias_HR,
    seed,
    tokens,
    before,
    after,
    distances,
    scale,
    threshold,
    keep_scale,
    q_stride_T,
    q_stride_H,
    k_stride_T,
    k_stride_G,
    v_stride_T,
    v_stride_G,
    out_grad_THD,
    lse_HT,
    delta_HT,
    k_grad_TGD,
    v_grad_TGD,
    out_grad_stride_T,
    out_grad_stride_H,
    k_grad_stride_T,
    k_grad_stride_G,
    v_grad_stride_T,
    v_grad_stride_G,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradients of keys and values, summed over the GROUP heads that share them; tiles are [KEYS, QUERIES]."""
    shared, first = tl.program_id(0), tl.program_id(1) * KEYS
    key = first + tl.arange(0, KEYS)
    # A query up to `before` behind a key or `after` in front of it reads it: the other way round.
    low, high, begin, stop = _reach(starts_T, ends_T, first, after, before, tokens, KEYS)
    k = _load_rows(k_TGD + shared * k_stride_G, first, k_stride_T, tokens, KEYS, D, BLOCK)
    v = _load_rows(v_TGD + shared * v_stride_G, first, v_stride_T, tokens, KEYS, D, BLOCK)
    k_grad = tl.zeros([KEYS, BLOCK], tl.float32)
    v_grad = tl.zeros([KEYS, BLOCK], tl.float32)
    for member in range(GROUP):
        head = shared * GROUP + member
        if seed is not None:
            query_key, key_key = _dropout_keys(seed, head)
            key_line = _line(key_key, key)
        for at in range(begin, stop, QUERIES):
            query = at + tl.arange(0, QUERIES)
            q = _load_rows(q_THD + head * q_stride_H, at, q_stride_T, stop, QUERIES, D, BLOCK)
            grad = _load_rows(out_grad_THD + head * out_grad_stride_H, at, out_grad_stride_T, stop, QUERIES, D, BLOCK)
            lse = tl.load(lse_HT + head * tokens + query, mask=query < stop, other=0.0)
            delta = tl.load(delta_HT + head * tokens + query, mask=query < stop, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * _LOG2_E)
            if bias_HR is not None:
                scores += _load_bias(bias_HR + head * distances, at - first, -1, distances, KEYS, QUERIES)
            reading = (query[None, :] >= low[:, None]) & (query[None, :] < high[:, None])
            weights = tl.exp2(tl.where(reading, scores, float("-inf")) - lse[None, :])
            weights_grad = tl.dot(v, tl.trans(grad), input_precision="ieee")
            used = weights
            if seed is not None:
                kept = _kept(key_line, _line(query_key, query), threshold)
                used = tl.where(kept, weights, 0.0)
                weights_grad = tl.where(kept, weights_grad * keep_scale, 0.0)
            v_grad = tl.dot(used.to(grad.dtype), grad, v_grad, input_precision="ieee")
            scores_grad = weights * (weights_grad - delta[None, :])
            k_grad = tl.dot(scores_grad.to(q.dtype), q, k_grad, input_precision="ieee")
    k_grad = (k_grad * scale).to(k_grad_TGD.dtype.element_ty)
    v_grad = (v_grad * keep_scale).to(v_grad_TGD.dtype.element_ty)
    _store_rows(k_grad_TGD + shared * k_grad_stride_G, k_grad, first, k_grad_stride_T, tokens, KEYS, D, BLOCK)
    _store_rows(v_grad_TGD + shared * v_grad_stride_G, v_grad, first, v_grad_stride_T, tokens, KEYS, D, BLOCK)
