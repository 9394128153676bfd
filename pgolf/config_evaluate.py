"""The settings of scoring: which weights are scored, and in which ways."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pgolf.config_checks import check_finite, parse_sizes, require
from pgolf.config_io import flat, to_dict

PLACES = ("q", "k", "v", "o", "mlp", "head")
"""Where adapters can be: the matrices of q, k and v, bypasses of the whole attention (o) and of the whole
MLP, and the output projection."""
LOOSE = "accepted by the challenge, fails the strict reading: scores depend on other documents"
"""What every output says of a score that does not depend on the earlier tokens of the text alone."""
ILLEGAL = "not allowed: scores positions it learned from"
"""What every output says of a score that the challenge does not accept in any reading."""
Method = Literal["plain", "sliding", "local", "ttt", "sgd", "phased", "causal_slot", "slot"]
"""A way to score."""
METHODS: tuple[Method, ...] = get_args(Method)
"""All ways to score."""
ADAPTIVE: tuple[Method, ...] = ("phased", "ttt", "sgd", "causal_slot", "slot")
"""Ways in which something learns while it scores; the first one of a run is its headline."""


@dataclass(frozen=True, kw_only=True)
class TttConfig:
    """Test-time training: adapters per document learn from each chunk after it is scored (as in PR #1855)."""

    on: str = "q,k,v,o,mlp,head"
    """Where the adapters are, some of q, k, v, o, mlp and head: queries, keys, values, the whole attention,
    the whole MLP and the output projection. PR #1953 has k,o,mlp,head."""
    rank: int = 80
    """Rank r of every adapter, >= 1."""
    alpha: float = 144.0
    """The outputs of the adapters are multiplied by alpha / rank; > 0."""
    lr: float = 1e-4
    """Learning rate of AdamW without momentum (beta1 = 0), >= 0; it takes one step after every chunk."""
    beta2: float = 0.99
    """Decay of the second moment per step, in [0, 1)."""
    eps: float = 1e-10
    """Added to the square root of the second moment, > 0."""
    weight_decay: float = 0.5
    """Decoupled weight decay, >= 0; it is multiplied by lr."""
    chunk: int = 64
    """Tokens of the shortest chunk, >= 1; the adapters learn from a chunk after it was scored."""
    chunk_growth: int = 8
    """A chunk at position p has p / chunk_growth tokens if that is more than chunk; 0 = no growth."""
    chunk_max: int = 256
    """Tokens of the longest chunk, at least chunk."""
    first_chunks: str = ""
    """Tokens of the chunks at the beginning of every document, before those of chunk tokens, such as 8,16,24;
    empty: none (PR #2014 has shorter first chunks)."""
    warm_a: bool = False
    """Keep the matrices A from one batch of documents to the next, as PR #1767 does; the scores then depend
    on other documents, and on the number of ranks."""
    gradient: Literal["window", "chunk"] = "window"
    """window: the exact gradient of a chunk's loss, which runs through the whole window. chunk: keys and
    values of the tokens before the chunk are constants for it, an approximation of what is learned; given the
    adapters, scores are the same."""
    batch_tokens: int = 65_536
    """Tokens per forward and backward pass over all documents; changes speed and memory, not the score."""
    batch_documents: int = 128
    """Most documents per batch, >= 1; each needs memory for its own adapters (`pr1855`: 84 MB)."""
    seed: int = 0
    """Seed of the initial adapters, >= 0; they are the same for every document."""
    members: int = 1
    """Sets of adapters per document, >= 1, with the seeds from `seed` on: an ensemble. Each set learns on its
    own, and the mean of their probabilities is scored. k sets take k times the time and adapter memory."""

    def __post_init__(self) -> None:
        check_finite("ttt", self)
        for name in ("rank", "chunk", "batch_tokens", "batch_documents", "members"):
            value = getattr(self, name)
            require(value >= 1, f"ttt.{name} must be >= 1, got {value}")
        require(
            self.chunk_max >= self.chunk,
            f"ttt.chunk_max must be at least ttt.chunk={self.chunk}, got {self.chunk_max}",
        )
        for name in ("lr", "weight_decay", "chunk_growth", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"ttt.{name} must be >= 0, got {value}")
        require(self.alpha > 0 and self.eps > 0, f"ttt.alpha, eps: must be > 0, got {self.alpha}, {self.eps}")
        require(0 <= self.beta2 < 1, f"ttt.beta2 must be in [0, 1), got {self.beta2}")
        names = self.on.split(",")
        require(
            set(names) <= set(PLACES) and len(set(names)) == len(names),
            f"ttt.on must name some of {','.join(PLACES)}, each once, got {self.on!r}",
        )
        require(
            all(0 < size <= self.chunk_max for size in parse_sizes(self.first_chunks, "ttt.first_chunks")),
            f"ttt.first_chunks must be in [1, ttt.chunk_max={self.chunk_max}], got {self.first_chunks}",
        )

    @property
    def places(self) -> tuple[str, ...]:
        """`on` as a tuple, in the order of `PLACES`."""
        return tuple(place for place in PLACES if place in self.on.split(","))

    @property
    def sizes(self) -> tuple[int, ...]:
        """`first_chunks` as numbers."""
        return parse_sizes(self.first_chunks, "ttt.first_chunks")


@dataclass(frozen=True, kw_only=True)
class SgdConfig:
    """Score-first SGD: the whole model learns from each chunk of the text after it is scored (PR #549)."""

    lr: float = 0.005
    """Learning rate of SGD at the first chunk, >= 0; it falls to 0 along half a cosine over the chunks."""
    momentum: float = 0.9
    """Momentum, in [0, 1)."""
    epochs: int = 3
    """Steps on each chunk, >= 1."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of all parameters; 0 = no limit."""
    chunk_tokens: int = 32_768
    """Tokens of a chunk, >= 1: it is scored as a whole, then learned as a whole in every step. Nothing is
    learned from the last chunk."""
    batch_tokens: int = 16_384
    """Tokens per forward and backward pass of a step; changes speed and memory, not the score."""

    def __post_init__(self) -> None:
        check_finite("sgd", self)
        for name in ("epochs", "chunk_tokens", "batch_tokens"):
            value = getattr(self, name)
            require(value >= 1, f"sgd.{name} must be >= 1, got {value}")
        for name in ("lr", "grad_clip"):
            require(getattr(self, name) >= 0, f"sgd.{name} must be >= 0, got {getattr(self, name)}")
        require(0 <= self.momentum < 1, f"sgd.momentum must be in [0, 1), got {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class SlotConfig:
    """SLOT: a shift of the last states that is fitted anew for every window (PR #1298)."""

    steps: int = 8
    """Steps of AdamW on each window, >= 0."""
    lr: float = 0.005
    """Learning rate of AdamW, without decay; >= 0."""

    def __post_init__(self) -> None:
        check_finite("slot", self)
        for name in ("steps", "lr"):
            require(getattr(self, name) >= 0, f"slot.{name} must be >= 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TiltConfig:
    """The n-gram tilt: a token that followed the same context before becomes more probable (PR #2135)."""

    on: bool = False
    """Make the token more probable that followed the same tokens earlier in the text; it depends on the
    tokens before it only. A run's plain scores are never tilted."""
    order: int = 16
    """Tokens of an n-gram, 2 to 1,024: the context is all but the last of them. It may begin in an earlier
    document."""
    threshold: float = 0.8
    """Least share of the earlier places with this context after which the token came, above 0, at most 1."""
    boost: float = 2.625
    """The probability of that token is multiplied by exp(boost) before all are made to sum to 1; 0 to 50."""
    seen: int = 1
    """Least number of earlier places with this context, >= 1."""

    def __post_init__(self) -> None:
        check_finite("tilt", self)
        require(2 <= self.order <= 1024, f"tilt.order must be in [2, 1024], got {self.order}")
        require(0 < self.threshold <= 1, f"tilt.threshold must be in (0, 1], got {self.threshold}")
        require(0 <= self.boost <= 50, f"tilt.boost must be in [0, 50], got {self.boost}")
        require(self.seen >= 1, f"tilt.seen must be >= 1, got {self.seen}")


def _published_adapters() -> TttConfig:
    return TttConfig(
        chunk=48, chunk_growth=0, chunk_max=48, warm_a=True, batch_tokens=131_072, batch_documents=64
    )


@dataclass(frozen=True, kw_only=True)
class PhasesConfig(SgdConfig):
    """Phases: pauses of test-time training in which the model learns from scored documents (PR #1610)."""

    documents: int = 2500
    """Documents after which the last phase begins, >= 1; documents are read in the order of their lengths,
    the longest first."""
    count: int = 3
    """Number of phases, >= 1, at equal distances; each learns from all documents scored so far."""
    lr: float = 0.001
    """Learning rate of SGD at the first chunk of a phase, >= 0; it falls to 0 along half a cosine."""
    epochs: int = 1
    """Steps on each chunk of a phase, >= 1."""
    adapters: TttConfig = field(default_factory=_published_adapters)
    """The adapters of the documents, as PR #1855 has them: chunks of 48 tokens throughout, A kept warm."""
    two_caps: bool = False
    """Let the phases learn the soft cap too, as one number for logits above 0 and one for those below; both
    start at model.softcap (PR #1923)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("documents", "count"):
            value = getattr(self, name)
            require(value >= 1, f"phases.{name} must be >= 1, got {value}")
        require(
            self.count <= self.documents,
            f"phases.count must be at most phases.documents={self.documents}, got {self.count}",
        )
        require(
            self.adapters.members == 1,
            f"phases.adapters.members must be 1 (an ensemble is possible with ttt alone), got "
            f"{self.adapters.members}",
        )

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Numbers of documents after which the phases begin."""
        return tuple(self.documents * (k + 1) // self.count for k in range(self.count))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which weights are scored after training, and further ways to score the quantized ones."""

    raw: bool = True
    """Score the raw weights after training."""
    ema: bool = True
    """Score the averaged weights after training."""
    every: int = 0
    """Also score the raw weights on the whole validation text every so many training steps, which takes time
    on the clock. 0 = never."""
    sliding: bool = False
    """Also score the quantized weights with a sliding window, in which more tokens see a long context."""
    stride: int = 64
    """Tokens that each window of `sliding`, `sgd`, `slot` and `causal_slot` scores, 1 to model.max_context; a
    smaller stride is slower."""
    local: bool = False
    """Also score the quantized weights with local attention: each document is read once, and every token sees
    the last `context` tokens."""
    ttt: bool = False
    """Also score the quantized weights with test-time training: adapters that learn each document."""
    adapters: TttConfig = field(default_factory=TttConfig)
    """Settings of `ttt`."""
    method: Method = "phased"
    """The way to score of the preset's pull request: plain, sliding, local, ttt, sgd (a sliding window over a
    model that learns from each chunk after it is scored), phased (ttt with phases), slot (SLOT of PR #1298,
    which the challenge does not allow) or causal_slot (the same from scored tokens alone)."""
    published: bool = False
    """Also score the quantized weights by `method`."""
    context: int = 0
    """Tokens of the longest window of all ways to score but a run's plain scores, and how far attention
    reaches in `local`; 0 = model.max_context. It may be larger than that (PR #1953 has 2,560 and PR #2014
    has 3,072), which takes more time."""
    sgd: SgdConfig = field(default_factory=SgdConfig)
    """Settings of `sgd`."""
    phases: PhasesConfig = field(default_factory=PhasesConfig)
    """Settings of `phased`."""
    slot: SlotConfig = field(default_factory=SlotConfig)
    """Settings of `slot` and `causal_slot`."""
    tilt: TiltConfig = field(default_factory=TiltConfig)
    """The n-gram tilt, on top of all ways to score but a run's plain scores."""

    def __post_init__(self) -> None:
        check_finite("evaluate", self)
        require(self.every >= 0, f"evaluate.every must be >= 0 steps, got {self.every}")
        require(self.stride >= 1, f"evaluate.stride must be >= 1, got {self.stride}")
        require(self.context >= 0, f"evaluate.context must be >= 0 tokens, got {self.context}")

    @property
    def ways(self) -> tuple[Method, ...]:
        """The further ways to score that are asked for; plain scores are made in any case."""
        asked = {self.method} if self.published else set()
        asked |= {"sliding"} if self.sliding else set()
        asked |= {"local"} if self.local else set()
        asked |= {"ttt"} if self.ttt else set()
        return tuple(way for way in METHODS if way in asked - {"plain"})

    @property
    def headline(self) -> Method:
        """The way to score of a run's headline, the first of `ADAPTIVE` that is asked for, else plain."""
        return next((way for way in ADAPTIVE if way in self.ways), "plain")

    def settings_of(self, way: Method) -> dict[str, Any]:
        """Return the settings on which a score of `way` depends, by dotted name."""
        kept = {
            "sliding": ["stride"],
            "ttt": ["adapters"],
            "sgd": ["stride", "sgd"],
            "phased": ["phases"],
            "slot": ["stride", "slot"],
            "causal_slot": ["stride", "slot"],
        }
        data = to_dict(self)
        names = ["context", *kept.get(way, []), *(["tilt"] if self.tilt.on else [])]
        return flat({key: data[key] for key in names})

    def keeps_apart(self, way: str) -> bool:
        """Return whether documents do not influence each other's scores in `way`."""
        alone = way in ("plain", "sliding", "local", "slot", "causal_slot") or (
            way == "ttt" and not self.adapters.warm_a
        )
        return alone and not self.tilt.on

    def remark(self, way: str) -> str:
        """Return what every output says of a score of `way`: `LOOSE`, `ILLEGAL` or nothing."""
        if way == "slot":
            return ILLEGAL
        return LOOSE if way == "phased" or (way == "ttt" and self.adapters.warm_a) else ""
