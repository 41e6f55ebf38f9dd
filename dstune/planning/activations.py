"""Bytes that one micro-batch keeps for the backward pass, from what each operation of a layer saves. It follows Korthikanti et al.
2022 (arXiv:2205.05198) operation by operation, for the layers as transformers implements them, except for norms: gated feed-forward
layers, repeated key and value heads, masks of packed rows. n: positions of a micro-batch, b: its rows, L: positions of a row, p:
bytes of a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dstune.config.parallel_rules import repeats_of_keys
from dstune.config.schema import Selective
from dstune.planning.setup import Setup

QUERIES, SCORES = 128, 2**20
"""For the backward pass of `samples`: positions, and scores of all heads, that are processed at once
(`dstune/models/cpu_attention.py`)."""


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer."""

    saved: int
    """Kept from the forward to the backward pass."""
    working: int
    """Additional bytes while the layer's own gradients are computed."""
    boundary: int
    """The layer's input, which is all that activation checkpointing keeps."""
    products: int
    """Outputs of matrix products and fused attention, which selective checkpointing also keeps (`dstune/models/recompute.py`)."""

    def kept_bytes(self, checkpointing: bool | Selective) -> int:
        """Return the bytes kept from the forward to the backward pass, until the layer's gradients are computed."""
        if isinstance(checkpointing, Selective):
            return self.boundary + self.products
        return self.boundary if checkpointing else self.saved


def layer(s: Setup) -> LayerActivations:
    """Return the activations of an average layer of the model."""
    m, n, p = s.model, s.tokens, s.weight_bytes
    if m.encoder or m.encoder_decoder:
        saved = _encoder_layer(s)
    else:
        saved = _decoder_layer(s)
    wide = n * p * 2 * m.intermediate
    if tiled(s):  # one piece is recomputed at a time, with its gradients
        wide = -(-n // s.tiles) * p * (4 + 2) * m.intermediate
    working = wide + n * p * 2 * m.hidden + _attention_working(s) + 2 * merged_experts(s)
    return LayerActivations(saved, working, n * p * m.hidden, _products(s))


def _products(s: Setup) -> int:
    """Return the bytes of a layer's products: queries, keys, values, attention output, and the feed-forward projections up and
    down."""
    m, n, p = s.model, s.tokens, s.weight_bytes
    query, key = m.heads * m.head_dim, m.kv_heads * m.head_dim
    attended = query + m.hidden if s.attention != "eager" else m.hidden
    wide = 1 if (m.encoder or m.encoder_decoder) and not m.gated else 2
    inner = 0 if m.experts else wide * m.intermediate + m.hidden  # those of experts are not kept
    sums = 4 * m.heads * n if s.attention != "eager" else 0
    return n * p * (query + 2 * key + attended + inner) + sums


def _decoder_layer(s: Setup) -> int:
    m, n, p = s.model, s.tokens, s.weight_bytes
    query, key = m.heads * m.head_dim, m.kv_heads * m.head_dim
    norms = m.norms * _rms_norm(s, m.hidden)
    inputs = 2 * n * p * m.hidden  # of the attention's and of the feed-forward layer's projections
    feed_forward = 0 if tiled(s) else 4 * n * p * m.intermediate  # gate, its activation, up, their product
    feed_forward += 2 * m.experts * n * p * m.hidden  # positions on their way to the experts and back
    query_norms = _rms_norm(s, query) + _rms_norm(s, key) if m.query_norm else 0
    return norms + inputs + feed_forward + query_norms + _attention(s, query, key) + _adapters(s)


def tiled(s: Setup) -> bool:
    """Return whether feed-forward layers are computed in pieces (`dstune/models/tiles.py`); experts are not."""
    return s.tiles > 1 and not s.model.experts


def _rms_norm(s: Setup, width: int) -> int:
    """Return the bytes of the input, and of one number per row (`dstune/models/norms.py`)."""
    return s.tokens * (width * s.weight_bytes + 4)


def masked(s: Setup) -> bool:
    """Return whether attention gets a mask. Packed and padded rows need one, unless flash attention gets the boundaries in another
    form, or samples attend one by one, as they do when ranks share rows."""
    return s.attention not in ("flash_attention_2", "samples") and s.sharing == 1


def _attention(s: Setup, query: int, key: int) -> int:
    """Return the bytes that attention keeps for its backward pass. query, key: the total widths of all heads."""
    n, p = s.tokens, s.weight_bytes
    # A mask makes transformers repeat the key and value heads; so does a row that ranks share, on a GPU.
    repeated = 2 * (
        query if masked(s) or (s.sharing > 1 and s.on_gpu) else key * repeats_of_keys(s.model.kv_heads, s.sharing)
    )
    projections = n * p * (query + repeated)
    output = n * p * query
    return projections + output + _scores(s)


def _scores(s: Setup) -> int:
    """Return the bytes that attention keeps of its scores, [b, heads, L, L]; if it is fused, only a sum per row."""
    m, p = s.model, s.weight_bytes
    square = s.rows * s.length * s.length
    sums = 4 * m.heads * s.tokens
    if not masked(s):
        return sums
    if s.attention == "sdpa" and not (s.dropout and not s.on_gpu):
        return sums + square * p  # the mask of every layer, in the weights' number format
    probabilities = (4 if p == 2 else 0) + p
    return square * m.heads * (probabilities + (p if m.soft_capped else 0) + (_noise(s) + p if s.dropout else 0))


def _attention_working(s: Setup) -> int:
    """Return the bytes of one layer's scores and their gradients during its backward pass."""
    square = s.rows * s.length * s.length
    if s.attention == "eager" or (s.attention == "sdpa" and s.dropout and not s.on_gpu):
        return 2 * square * s.model.heads * 4
    if s.attention == "samples":
        # A block of scores and their gradients, in fp32 and in the products' format; gradients of keys and values in fp32; masks
        # of windows (`dstune/models/cpu_attention.py`).
        of_position = s.model.heads * s.length
        queries = min(s.length, max(16, min(QUERIES, SCORES // of_position)))
        window = s.model.window if s.model.window and s.model.window < s.length else 0
        masks = 2 * window * window * (1 + s.weight_bytes)
        return (
            of_position * queries * 2 * (4 + s.weight_bytes)
            + 2 * s.tokens * s.model.kv_heads * s.model.head_dim * 4
            + masks
        )
    return 0


def _noise(s: Setup) -> int:
    """Return the bytes of dropout's mask per element: a boolean on GPUs, a factor on CPUs."""
    return 1 if s.on_gpu else s.weight_bytes


def _adapters(s: Setup) -> int:
    """Return the bytes of LoRA: the product with the first matrix, and with dropout the input of each adapter and its mask."""
    if not s.adapter:
        return 0
    n, p = s.tokens, s.weight_bytes
    index = s.model.layers - 1 if s.model.experts else 0  # the first layers may have no experts
    first = [tensor for tensor in s.trained if tensor.layer == index and tensor.name.endswith("lora_A.weight")]
    shapes = [tensor.shape for tensor in first if ".experts." not in tensor.name]
    rank, inputs = sum(shape[0] for shape in shapes), sum(shape[1] for shape in shapes)
    return n * p * rank + (n * inputs * (p + _noise(s)) if s.adapter_dropout else 0) + merged_experts(s)


def merged_experts(s: Setup) -> int:
    """Return the bytes of merged experts: experts with adapters compute with the sum of both, which is a second complete copy of a
    layer's weights on every rank, not reduced by partitioning."""
    last = s.model.layers - 1
    if not s.adapter or not any(t.layer == last and ".experts." in t.name for t in s.trained):
        return 0
    return s.weight_bytes * sum(tensor.count for tensor in s.model.of_layer(last) if ".experts." in tensor.name)


def _encoder_layer(s: Setup) -> int:
    m, n, p = s.model, s.tokens, s.weight_bytes
    query = m.heads * m.head_dim
    if m.kind == "modernbert":
        # Norm inputs and outputs; queries, keys and values before and after the rotation; the attention's output.
        hidden = 4 * n * p * m.hidden + n * p * (3 + 2) * m.hidden + n * p * m.hidden
        return hidden + 4 * n * p * m.intermediate + _scores(s)
    dropout = 2 * n * m.hidden * (_noise(s) + 0) if s.dropout else 0
    # Input, queries, keys, values, the attention's output; both norms' inputs, and the output of the first.
    hidden = n * p * (m.hidden + 4 * query + 3 * m.hidden)
    feed_forward = n * p * m.intermediate * (4 if m.gated else 2)
    attention = _scores(s) + (_disentangled(s) if m.relative_attention else 0)
    if m.encoder_decoder:  # the decoder's layers attend twice
        hidden += n * p * 4 * query // 2
    return hidden + feed_forward + attention + dropout


def _disentangled(s: Setup) -> int:
    """Return the bytes of DeBERTa's scores of content to position and back, gathered from products with all relative positions."""
    return s.rows * s.length * s.length * s.model.heads * s.weight_bytes * 2


@dataclass(frozen=True)
class HeadActivations:
    saved: int
    """Kept until the backward pass of the head, which ends before that of the layers."""
    peak: int
    """The peak while the loss is computed and differentiated; includes `saved`."""


CHUNK_BYTES, ACCELERATOR_CHUNK_BYTES, TILE_ROWS = 2**27, 2**29, 256
"""Size of the logits that the chunked cross entropy computes at a time (`dstune/models/cross_entropy.py`)."""
BLOCK_ELEMENTS = {False: 2**18, True: 2**24}
"""Number of logits that are converted to fp32 probabilities at a time, on a CPU and on a GPU."""


def head(s: Setup) -> HeadActivations:
    """Return the bytes of the vocabulary projection and the cross entropy, at positions with a target (`dstune/models/heads`)."""
    m, p = s.model, s.weight_bytes
    if m.encoder or not any(tensor.shape == (m.vocabulary, m.hidden) for tensor in m.tensors):
        return HeadActivations(0, 0)
    targets = int(s.tokens * s.target_share)
    hidden = targets * p * m.hidden + _rms_norm(s, m.hidden)  # the chosen rows of the last norm, and the norm
    if m.soft_capped:
        # The model changes its logits, so all of them are made. Forward: logits, the same in fp32, log-probabilities.
        # Backward: log-probabilities and two gradients in fp32.
        logits = targets * m.vocabulary
        return HeadActivations(hidden + logits * 4, hidden + logits * 12)
    rows = min(targets, chunk_rows(s))
    many = targets > rows
    weight = m.vocabulary * m.hidden if trains_projection(s) else 0
    # Gradients are made in the forward pass: in fp32 for the weight where several chunks are summed.
    kept_bytes = hidden + targets * m.hidden * p + weight * (4 if many else p)
    # On a GPU logits are in fp32, beside their gradient.
    chunk = rows * m.vocabulary * (4 + p if s.on_gpu and p < 4 else p) + max(BLOCK_ELEMENTS[s.on_gpu], m.vocabulary) * 8
    # In half precision a chunk's product is made beside the sum; in fp32 it is added in place.
    forward = kept_bytes + chunk + (weight * p if many and p < 4 else 0)
    backward = kept_bytes + weight * p + targets * m.hidden * 4
    return HeadActivations(kept_bytes, max(forward, backward))


def chunk_rows(s: Setup) -> int:
    """Return the number of targets whose logits are computed at a time."""
    if s.on_gpu:
        return max(TILE_ROWS, ACCELERATOR_CHUNK_BYTES // (4 * s.model.vocabulary) // TILE_ROWS * TILE_ROWS)
    return max(1, CHUNK_BYTES // (s.weight_bytes * s.model.vocabulary))


def trains_projection(s: Setup) -> bool:
    """Return whether the vocabulary projection's weight, or the embedding that it is tied to, is trained."""
    names = ("lm_head.weight",) if not s.model.tied else ("embed_tokens.weight", "shared.weight", "lm_head.weight")
    return any(tensor.name.endswith(names) for tensor in s.trained)


def evaluation(s: Setup) -> int:
    """Return the peak of a forward pass without gradients: one layer's tensors, then logits, the same in fp32,
    log-probabilities."""
    rows = s.evaluation_batch or s.micro_batch_size
    once = replace(s, micro_batch_size=rows, checkpointing=False, tiles=1)
    targets = once.tokens if s.model.soft_capped else min(once.tokens, chunk_rows(s))
    loss = targets * s.model.vocabulary * (s.weight_bytes + 8) if head(s).peak else 0
    return max(layer(once).saved, loss) + shared(once)


def shared(s: Setup) -> int:
    """Return the bytes that all layers share: embedded tokens, the mask, sines and cosines."""
    m, n, p = s.model, s.tokens, s.weight_bytes
    mask = s.rows * s.length * s.length if masked(s) else 0
    return n * p * m.hidden + mask + 2 * n * p * m.head_dim + 3 * 8 * n
