"""The settings of the network, which a model file holds, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pgolf.config_checks import check_finite, require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Legend: `V` vocabulary, `D` width, `L` layers, `H` heads, `K` dimension of a head."""

    vocab_size: int = 8192
    """Number of token ids `V`, 8 to 65536; it must equal that of the tokenizer."""
    layers: int = 11
    """Number of physical layers `L`, >= 1."""
    width: int = 512
    """Model width `D`, a multiple of heads."""
    heads: int = 8
    """Number of query heads `H`; a head has `K` = width / heads dimensions."""
    kv_heads: int = 4
    """Number of key/value heads, a divisor of heads; heads / kv_heads consecutive query heads share one."""
    mlp_mult: int = 4
    """Hidden width of the MLP as a multiple of the model width, >= 1."""
    activation: Literal["leaky_relu2", "relu2"] = "leaky_relu2"
    """Activation of the MLP: leaky_relu2 is leaky_relu(x, leaky_slope)^2, relu2 is relu(x)^2."""
    leaky_slope: float = 0.5
    """Slope of leaky_relu2 below 0, 0 to 1; PR #1855 has 0.5, and later pull requests 0.3."""
    max_context: int = 2048
    """Longest attention segment, in tokens; longer documents are cut into segments of this length."""
    rope_dims: int = 16
    """Number of leading dimensions of a head that rotate (partial RoPE): even, 0 to `K`."""
    rope_base: float = 10000.0
    """Base of the RoPE frequencies, > 0."""
    qk_gain: float = 5.0
    """Initial value of the learned gain per query head, > 0; it is applied after QK-norm and RoPE."""
    xsa_layers: int = 11
    """The last xsa_layers layers remove from each head's output its part along the token's own value."""
    xsa_strength: bool = False
    """Let each head of these layers learn how many times that part is removed; it starts at 1."""
    head_gate: Literal["none", "sparse", "dense", "out"] = "sparse"
    """Gate on each head's output: none; sparse, sigmoid(scale * w.n[:window]); dense, sigmoid(w.n); out,
    2 * sigmoid(w.n[:window])."""
    gate_window: int = 12
    """Number of leading channels that the gates sparse and out read, and the smear gate unless smear_window
    says another; 1 to width."""
    sparse_gate_scale: float = 0.5
    """Factor inside the sigmoid of the sparse gate, >= 0."""
    smear_gate: bool = True
    """Add to each embedding a gated copy of the previous token's embedding, except at a BOS."""
    smear_kind: Literal["token", "channel"] = "token"
    """How it is gated: token, by one number per token, lambda * sigmoid(w.x[:smear_window]); channel, by one
    learned number per channel, as a mix (1 - g) * x_t + g * x_(t-1) of normed embeddings (PR #549)."""
    smear_window: int = 0
    """Number of leading channels that smear_kind=token reads, at most width; 0 = gate_window."""
    smear_over_bos: bool = False
    """Let the smear gate add to a BOS, too, as early published stacks did: it leaks the last token of another
    document, which the challenge does not allow. Only to repeat such a result."""
    bigram_buckets: int = 0
    """Rows of a table that a hash of each token and the one before it picks from, to add to its embedding
    (PR #162 and later ones have 1,536 to 4,096); 0 = none, else >= 2."""
    bigram_width: int = 128
    """Width of that table, >= 1; a learned matrix makes the model width of it."""
    value_embed_layers: int = 0
    """The last value_embed_layers layers add a second embedding of the token to its value (PR #414 has 2)."""
    value_embed_width: int = 128
    """Width of the table of that embedding, >= 1; a learned matrix makes the width of the values of it."""
    ln_scale: bool = True
    """Divide the normed input of layer i, counted from 0, by sqrt(i + 1)."""
    resid_mix: bool = True
    """Replace the input x of a layer by m0 * x + m1 * x0, with the first embedding x0 and learned m0, m1."""
    skip: Literal["none", "weighted", "gated"] = "gated"
    """U-Net skips s from encoder to decoder: weighted, x + w * s; gated, w*s + sigmoid(g) * (x - w*s)."""
    parallel_from: int = 8
    """First physical layer whose attention and MLP run in parallel, see parallel; layers = none."""
    parallel: Literal["lanes", "gptj"] = "lanes"
    """Attention and MLP from layer parallel_from on: lanes, on two residual lanes, both are added to both;
    gptj, on the same mixed input of one residual stream, both are added to it (PR #1493)."""
    recurrence_start: int = 3
    """First physical layer of the segment that depth recurrence repeats, from 0."""
    recurrence_end: int = 5
    """Last physical layer of that segment, inclusive; below parallel_from where parallel=lanes."""
    recurrence_repeats: int = 2
    """Further passes through the segment once recurrence is on, 0 to 64; 0 = no recurrence. More passes make
    the network deeper at the same bytes, and the steps slower."""
    mudd: int = 0
    """Width of the small networks of MUDD connections (arXiv 2502.12170), which add earlier states to those
    before the last layer and before the last norm, token by token (modded-nanogpt #259 has 64); 0 = none."""
    softcap: float = 30.0
    """Soft cap of the logits, > 0: they become softcap * tanh(z / softcap)."""
    logit_scale: float = 1.0
    """Factor on the logits before the cap, > 0: they become softcap * tanh(logit_scale * z / softcap).
    quant.cap_documents fits both numbers of a finished model."""
    embed_init_std: float = 0.005
    """Standard deviation of the initial token embedding, > 0."""

    def __post_init__(self) -> None:
        check_finite("model", self)
        for name in ("layers", "width", "heads", "kv_heads", "mlp_mult", "max_context"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name} must be >= 1, got {value}")
        self._check_parts()
        for name in ("recurrence_repeats", "sparse_gate_scale"):
            require(getattr(self, name) >= 0, f"model.{name} must be >= 0, got {getattr(self, name)}")
        require(
            self.width % self.heads == 0,
            f"model.width must be a multiple of model.heads, got {self.width} and {self.heads}",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"model.heads must be a multiple of model.kv_heads, got {self.heads} and {self.kv_heads}",
        )
        require(
            self.rope_dims % 2 == 0 and 0 <= self.rope_dims <= self.head_dim,
            f"model.rope_dims must be even and in [0, head_dim={self.head_dim}], got {self.rope_dims}",
        )
        require(
            0 <= self.recurrence_start <= self.recurrence_end < self.layers or self.recurrence_repeats == 0,
            f"model.recurrence_start..recurrence_end must lie in [0, layers={self.layers}), "
            f"got {self.recurrence_start}..{self.recurrence_end}",
        )
        require(
            self.recurrence_repeats == 0 or self.recurrence_end < self.parallel_from or not self.lanes,
            f"model.recurrence_end must be below model.parallel_from={self.parallel_from}, "
            f"got {self.recurrence_end}; only model.parallel=gptj has no such limit",
        )
        require(
            0 <= self.xsa_layers <= self.layers,
            f"model.xsa_layers must be in [0, layers={self.layers}], got {self.xsa_layers}",
        )
        require(
            1 <= self.parallel_from <= self.layers,
            f"model.parallel_from must be in [1, layers={self.layers}], got {self.parallel_from}",
        )
        require(
            1 <= self.gate_window <= self.width,
            f"model.gate_window must be in [1, width={self.width}], got {self.gate_window}",
        )
        for name in ("rope_base", "qk_gain", "softcap", "logit_scale", "embed_init_std"):
            require(getattr(self, name) > 0, f"model.{name} must be > 0, got {getattr(self, name)}")
        require(
            8 <= self.vocab_size <= 65536,
            f"model.vocab_size must be in [8, 65536] (shards hold uint16), got {self.vocab_size}",
        )

    def _check_parts(self) -> None:
        """Check the settings of single parts."""
        require(0 <= self.leaky_slope <= 1, f"model.leaky_slope must be in [0, 1], got {self.leaky_slope}")
        require(
            self.bigram_buckets == 0 or self.bigram_buckets >= 2,
            f"model.bigram_buckets must be 0 (no bigram hash) or >= 2, got {self.bigram_buckets}",
        )
        require(
            0 <= self.smear_window <= self.width,
            f"model.smear_window must be in [0, width={self.width}], got {self.smear_window}",
        )
        for name in ("bigram_width", "value_embed_width"):
            require(getattr(self, name) >= 1, f"model.{name} must be >= 1, got {getattr(self, name)}")
        require(
            self.mudd == 0 or (0 < self.mudd <= 4096 and self.layers >= 2),
            "model.mudd must be 0 (no MUDD connections), or 1 to 4096 with model.layers >= 2, whose states "
            f"they add; got {self.mudd} with {self.layers} layers",
        )
        require(
            not self.xsa_strength or self.xsa_layers > 0,
            "model.xsa_strength needs layers with exclusive self-attention; got model.xsa_layers=0",
        )
        require(
            0 <= self.value_embed_layers <= self.layers,
            f"model.value_embed_layers must be in [0, layers={self.layers}], got {self.value_embed_layers}",
        )

    @property
    def head_dim(self) -> int:
        """Dimension of one head, `K`."""
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Width of all keys together, which is also that of all values."""
        return self.kv_heads * self.head_dim

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return self.mlp_mult * self.width

    @property
    def lanes(self) -> bool:
        """Whether some layers run on two residual lanes."""
        return self.parallel == "lanes" and self.parallel_from < self.layers

    @property
    def illegal(self) -> str:
        """A warning, if the challenge does not allow what a setting does; otherwise empty."""
        if not (self.smear_gate and self.smear_over_bos):
            return ""
        return (
            "warning: model.smear_over_bos=true leaks the last token of a document into the next one of its "
            "batch. The challenge ruled that illegal: no submission may have it, and its scores depend on "
            "how documents are packed"
        )

    @property
    def slope(self) -> float:
        """Slope of the MLP's activation below 0, before it is squared."""
        return self.leaky_slope if self.activation == "leaky_relu2" else 0.0
