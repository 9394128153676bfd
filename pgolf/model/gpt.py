"""The language model: parameters as banks, and one forward pass for every use, of the blocks in blocks.py.

Training, scoring, calibration and test-time training all run `GPT.hidden`. Matrices of one shape are stacked
into a bank (the layer is the first dimension), so that the optimizer works on few tensors; the small
parameters are stacked too.
Legend: `T` tokens, `D` width, `V` vocab, `L` layers, `H` heads, `K` head dim, `M` hidden, `W` gate window.
Source: PR #1855 of the parameter-golf challenge, 35,945,671 parameters at the default sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pgolf.config import ModelConfig
from pgolf.errors import UserError
from pgolf.model.attention import Asked, AttentionKernel, AttentionName, AttentionWeights, select_attention
from pgolf.model.blocks import (
    Context,
    Folded,
    Kernels,
    LayerWeights,
    MlpKernel,
    Tap,
    fold,
    join_lanes,
    parallel_block,
    serial_block,
)
from pgolf.model.embed import Bigram, ChannelSmear, Smear, stem, value_embeddings
from pgolf.model.gates import MixKernel, Skip
from pgolf.model.heads import HeadsName, select_branch
from pgolf.model.lora import Adapters, Scales
from pgolf.model.mudd import NAMES as MUDD_NAMES
from pgolf.model.mudd import Tail, add_sources
from pgolf.model.parameters import initial_parameters
from pgolf.model.parameters import layer_order as layer_order
from pgolf.model.parameters import parameter_shapes as parameter_shapes
from pgolf.model.parameters import skip_count as skip_count
from pgolf.model.rope import rope_tables
from pgolf.model.threads import Threads, threaded
from pgolf.ops import linear_softcap_ce, norm_mlp, norm_mlp_ref, stream_mix
from pgolf.ops._compiler import room_for_graphs

Observe = Callable[[str, int, Tensor], None]
CompileName = Literal["off", "blocks", "model"]
"""How a model is compiled, see `GPT.prepare`."""
MlpName = Literal["auto", "composed"]
MixName = Literal["auto", "composed"]
Rounding = Callable[[str, Tensor], Tensor]
"""Takes the name of a bank and the bank, returns what a forward pass uses instead, see `fake_quant.py`."""


class GPT(nn.Module):
    """Decoder-only transformer of PR #1855, whose parts `ModelConfig` switches on and off.

    Call it as `model(inputs, targets, cu_seqlens, max_seqlen=..., loop=...)`; it returns the loss of each
    token in nats.
    """

    tok_emb: nn.Parameter
    qo_bank: nn.Parameter
    kv_bank: nn.Parameter
    mlp_up_bank: nn.Parameter
    mlp_down_bank: nn.Parameter
    attn_scale: nn.Parameter
    mlp_scale: nn.Parameter
    skip_weights: nn.Parameter
    skip_gates: nn.Parameter
    smear_weight: nn.Parameter
    smear_lambda: nn.Parameter
    smear_logit: nn.Parameter
    bigram_table: nn.Parameter
    bigram_proj: nn.Parameter
    bigram_scale: nn.Parameter
    value_table: nn.Parameter
    value_proj: nn.Parameter
    value_scale: nn.Parameter
    value_layer_scale: nn.Parameter
    bank_names: tuple[str, ...] = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
    """Parameters for Muon. The projections of further tables are not among them, as in published stacks."""
    embed_names: tuple[str, ...] = ("tok_emb",)
    """Embeddings; a model with further tables has more of them."""
    mudd_names: tuple[str, ...] = ()
    """Parameters of the MUDD connections, which have a learning rate of their own."""
    attention_name: AttentionName
    attention_note: str
    """A sentence that says why an installed kernel is not used; otherwise empty."""
    heads_name: HeadsName
    """What computes the heads: "auto" is `attend_heads`, "plain" also, but without `qkv_rope`; "composed" is
    torch's operators."""
    heads_note: str
    """A sentence that says why a trial refused `attend_heads`, or `qkv_rope` in it; otherwise empty."""
    compiled = False  # prepared to be compiled, with an attention kernel that can be in a graph

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self._attention: AttentionKernel | None = None
        self._mlp: MlpKernel = norm_mlp
        self._mix: MixKernel | None = None
        self._threads: Threads | None = None
        self._rope: tuple[Tensor, Tensor] | None = None
        self._serial: Callable[..., Tensor] = serial_block
        self._parallel: Callable[..., tuple[Tensor, Tensor]] = parallel_block
        self._stem: Callable[..., Tensor] = stem
        self._value_embeddings: Callable[..., Tensor] = value_embeddings
        self._fold: Callable[..., Folded] = fold
        self._join: Callable[..., Tensor] = join_lanes
        self._add_sources: Callable[..., Tensor] = add_sources
        self._compiled_layers: Callable[..., Tensor] | None = None
        for name, value in initial_parameters(config, seed=seed).items():
            self.register_parameter(name, nn.Parameter(value))
        for part, used in (("bigram", config.bigram_buckets), ("value", config.value_embed_layers)):
            if used:
                self.embed_names += (f"{part}_table",)
        if config.mudd:
            self.mudd_names = MUDD_NAMES

    def prepare(
        self,
        device: torch.device,
        *,
        attention: AttentionName = "auto",
        compile: CompileName = "off",
        backend: str | Callable[..., Any] = "inductor",
        mlp: MlpName = "auto",
        mix: MixName = "composed",
        heads: HeadsName = "auto",
        threads: bool | None = None,
    ) -> GPT:
        """Move to `device`, choose the attention kernel and the compute dtype, and compile; return the model.

        The compute dtype is bfloat16 on CUDA and float32 elsewhere.

        Args:
            attention: see `select_attention`.
            compile: "blocks" compiles a few small graphs, which layers share with the loop on and off.
                "model" compiles all layers as one graph, once with the loop and once without, which fuses
                across layers and takes several times as long to compile. "off" compiles nothing.
            backend: backend of torch.compile.
            mlp: "auto" computes the MLP with `norm_mlp`, which has kernels for Hopper GPUs; "composed" uses
                torch's operators everywhere, for a comparison.
            mix: "composed" mixes the streams with torch's operators, "auto" with `stream_mix`, which
                saves about one percent of a pass, but cannot add the gradients of threads.
            heads: "auto" computes what is next to attention with `attend_heads`, where the attention is
                pgolf's own or flash-attn-4, and the product of q, k and v with `qkv_rope`, where its kernel
                takes these heads. For comparisons, "plain" leaves that product to torch, and "composed" uses
                torch's operators everywhere.
            threads: whether the blocks add the gradients of streams that several of them read, see
                `threads.py`; otherwise autograd does. None: with compile="blocks". With "model" there is one
                graph, which needs none.
        """
        self.to(device)
        self.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        c = self.config
        self.attention_name, self._attention, self.attention_note = select_attention(
            attention, device, heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim
        )
        self._mlp = norm_mlp if mlp == "auto" else norm_mlp_ref
        self._mix = stream_mix if mix == "auto" else None
        self.heads_name, self._branch, self.heads_note = select_branch(
            heads, self.attention_name, self._attention, c, device
        )
        jit = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        wanted = compile == "blocks" if threads is None else threads and compile != "model"
        self._threads = threaded(jit if compile == "blocks" else None) if wanted else None
        self.compiled = compile != "off" and self.attention_name != "sdpa"
        if compile != "off":
            room_for_graphs(c.layers)
            self._stem, self._fold, self._value_embeddings = jit(stem), jit(fold), jit(value_embeddings)
        if compile == "blocks":
            self._serial, self._parallel = jit(serial_block), jit(parallel_block)
            self._join, self._add_sources = jit(join_lanes), jit(add_sources)
        elif compile == "model":
            self._compiled_layers = jit(self.layers)
        return self

    def exact(self) -> GPT:
        """Compute in float32 wherever the model runs, after `prepare` with sdpa; return the model."""
        self.compute_dtype = torch.float32
        return self

    def quant_inputs(self) -> dict[str, list[tuple[str, int]]]:
        """Return by bank name the input of each of its matrices, as the (kind, layer) that `observe` gets."""
        layers = range(self.config.layers)

        def of(kind: str) -> list[tuple[str, int]]:
            return [(kind, i) for i in layers]

        return {
            "qo_bank": of("attn_in") + of("attn_out"),
            "kv_bank": of("attn_in") + of("attn_in"),
            "mlp_up_bank": of("mlp_in"),
            "mlp_down_bank": of("mlp_out"),
            "tok_emb": [("head", 0)],
        }

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor,
        *,
        max_seqlen: int,
        loop: bool,
        observe: Observe | None = None,
        rounding: Rounding | None = None,
    ) -> Tensor:
        """Return the loss of every target, `(T,)` float32, in nats; it is 0 for a target of -100.

        Args:
            inputs: `(T,)` int64, packed documents.
            targets: `(T,)` int64, the token that follows each input, or -100.
            cu_seqlens: `(S + 1,)` int32 starts of the segments, then T; nothing crosses a segment boundary.
            max_seqlen: tokens of the longest segment, at most config.max_context.
            loop: whether the repeated layers run several times (depth recurrence).
            observe: called as observe(kind, layer, x) with the input of every matrix; the blocks then run
                without compilation.
            rounding: rounds the matrices of attention and MLP for this pass; None: it sees them as they are.

        Raises:
            ValueError: max_seqlen is above config.max_context.
        """
        hidden, _ = self.hidden(
            inputs, cu_seqlens, max_seqlen=max_seqlen, loop=loop, observe=observe, rounding=rounding
        )
        if observe is not None:
            observe("head", 0, hidden)
        # With the float32 table, its gradient is accumulated in float32 and not rounded to the compute dtype.
        return linear_softcap_ce(hidden, self.tok_emb, targets, self.config.softcap, reduction="none")

    def hidden(
        self,
        inputs: Tensor,
        cu_seqlens: Tensor,
        *,
        max_seqlen: int,
        loop: bool,
        observe: Observe | None = None,
        adapters: Adapters | None = None,
        asked: int = 0,
        rounding: Rounding | None = None,
        weights: list[LayerWeights] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the input of the output projection `(T, D)` and the embedding table `(V, D)`, see `scaled`.

        Both are in the compute dtype.

        Args:
            inputs, cu_seqlens, max_seqlen, loop, observe, rounding: as in `forward`.
            adapters: adapters of the layers, for documents that all have the same length and are packed in
                order; the model must not be compiled. The caller applies the adapter of the head.
            asked: with adapters: return the states of the last `asked` tokens of each document only. Then the
                layer that runs last computes keys and values of the others, and nothing else. 0: of all.
            weights: what `layer_weights` returned, if that is known.
        """
        config = self.config
        if max_seqlen > config.max_context:
            raise UserError(
                f"GPT: max_seqlen must be at most model.max_context={config.max_context}, got {max_seqlen}"
            )
        weights = weights or self.layer_weights(rounding)
        table = self.tok_emb.to(self.compute_dtype)
        x = self.embed(inputs, table, cu_seqlens)
        if observe is None and inputs.is_cuda:
            # The number of segments changes from batch to batch. Only the attention kernel, which is one
            # node of the compiled graph, depends on it.
            torch._dynamo.mark_dynamic(cu_seqlens, 0)
        ctx = Context(x, self.rope(inputs.shape[0]), cu_seqlens, self.values(inputs))
        layers = self.layers if observe is not None else (self._compiled_layers or self.layers)
        if adapters is not None:
            if asked:
                ctx = ctx._replace(asked=Asked.last(asked, max_seqlen, cu_seqlens, ctx.rope))
            return self.scaled(self.layers(weights, ctx, loop, observe, adapters)), table
        return self.scaled(layers(weights, ctx, loop, observe)), table

    def scaled(self, hidden: Tensor) -> Tensor:
        """Return the input of the output projection: what `layers` returned, times model.logit_scale.

        It is here and not in `layers`, so that no compiled graph depends on the scale, which may be fitted.
        """
        scale = self.config.logit_scale
        return hidden if scale == 1.0 else hidden * scale

    def layers(
        self,
        weights: list[LayerWeights],
        ctx: Context,
        loop: bool,
        observe: Observe | None = None,
        adapters: Adapters | None = None,
    ) -> Tensor:
        """Run all layers on the embeddings; return their final normed states `(T, D)`."""
        config = self.config
        asked, ctx = ctx.asked, ctx._replace(asked=None)
        # A view, because x is x0 in layer 0, and the compiler would make another graph for inputs that are
        # the same object.
        x = ctx.x0.view(ctx.x0.shape)
        encoder, decoder = layer_order(config, loop=loop)
        saved: list[Tensor] = []
        tail = Tail(self, config, ctx.x0, self._add_sources)
        for slot, i in enumerate(encoder):
            w = _adapt(weights[i], adapters, slot)
            y, x, ctx = self._run_serial(x, None, i, w, ctx, observe, (True, True))
            # The skip takes the output of the layer before from this layer, which has read it.
            saved[-1:] = [x, y] if saved else [y]
            x = y
            tail.keep(i, x)
        # Views for the same reason: the last saved output is the decoder's first input, and the lanes start
        # as one.
        lanes = (x, x.view(x.shape))
        for j, i in enumerate(decoder):
            w = _adapt(weights[i], adapters, len(encoder) + j)
            skip = self._skip(j, saved.pop().view(x.shape)) if saved else None
            again = j < len(decoder) - 1
            if not again:
                lanes, ctx = (tail.before_last(lanes[0]), lanes[1]), ctx._replace(asked=asked)
            if i < config.parallel_from or not config.lanes:
                x, _, ctx = self._run_serial(lanes[0], skip, i, w, ctx, observe, (False, again))
                lanes = (x, x.view(x.shape))
                tail.keep(i, x)
            else:
                # A view in every layer, because the first one's is, and views need graphs of their own.
                lanes = lanes[0], lanes[1].view(x.shape)
                lanes, ctx = self._run_parallel(lanes, skip, i, w, ctx, observe, again)
                tail.keep(i, *lanes)
        return self._join(*tail.before_norm(*lanes, asked))

    def embed(self, inputs: Tensor, table: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return the input `(T, D)` of the first layer, from the embedding table `(V, D)`."""
        first = torch.zeros(inputs.shape[0] + 1, dtype=torch.bool, device=inputs.device)
        first.index_fill_(0, cu_seqlens.long(), True)
        config, dtype = self.config, self.compute_dtype
        gate: Smear | ChannelSmear | None = None
        bigram = None
        if config.smear_gate and config.smear_kind == "token":
            gate = Smear(self.smear_weight.to(dtype), self.smear_lambda.to(dtype), config.smear_over_bos)
        elif config.smear_gate:
            gate = ChannelSmear(self.smear_logit.to(dtype), config.smear_over_bos)
        if config.bigram_buckets:
            small = self.bigram_proj[0].to(dtype), self.bigram_scale.to(dtype)
            bigram = Bigram(self.bigram_table.to(dtype), *small)
        return self._stem(inputs, table, first[:-1], gate, bigram)

    def values(self, inputs: Tensor) -> Tensor | None:
        """Return the value embeddings `(T, G * K)` of `inputs` `(T,)`; None if the model has none."""
        if not self.config.value_embed_layers:
            return None
        names = ("value_table", "value_proj", "value_scale")
        table, proj, scale = (getattr(self, name).to(self.compute_dtype) for name in names)
        return self._value_embeddings(inputs, table, proj[0], scale)

    def layer_weights(self, rounding: Rounding | None = None) -> list[LayerWeights]:
        """Return the weights of each layer; q, k and v are one matrix, scales are part of the matrices."""
        config, dtype, layers = self.config, self.compute_dtype, self.config.layers
        small = {name: getattr(self, name, None) for name in ("head_gate", "resid_mix", "lane_post")}
        banks: list[Tensor] = [self.qo_bank, self.kv_bank, self.mlp_up_bank, self.mlp_down_bank]
        if rounding is not None:
            # Outside of what is compiled: a switch that the compiler reads would be baked into the graph.
            banks = list(map(rounding, GPT.bank_names, banks))
        folded = self._fold(
            *banks,
            small["head_gate"],
            self.attn_scale,
            self.mlp_scale,
            config.ln_scale,
            dtype,
        )

        def cut(tensor: Tensor | None) -> Any:
            return [None] * layers if tensor is None else tensor.unbind()

        def cast(name: str) -> Any:
            tensor = getattr(self, name, None)
            return cut(None if tensor is None else tensor.to(dtype))

        rows = zip(
            map(
                AttentionWeights,
                *(cut(folded.qkv), cut(folded.out), cast("q_gain"), cut(folded.gate)),
                self._of_last_layers("value_layer_scale"),
                self._of_last_layers("xsa_strength"),
            ),
            cut(folded.up),
            cut(folded.down),
            cut(small["resid_mix"]),
            cast("lane_post"),
            cast("lane_resid"),
            map(Scales, cut(folded.ln), cast("attn_scale"), cast("mlp_scale")),
            strict=True,
        )
        return [LayerWeights(*row) for row in rows]

    def _of_last_layers(self, name: str) -> list[Tensor | None]:
        """Return each layer's row of a parameter that only the last layers have; None for the others."""
        tensor = getattr(self, name, None)
        rows = () if tensor is None else tensor.to(self.compute_dtype).unbind()
        return [None] * (self.config.layers - len(rows)) + list(rows)

    def rope(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of positions 0 to tokens - 1, `(tokens, 1, R / 2)` each."""
        config, device = self.config, self.tok_emb.device
        if self._rope is None or self._rope[0].shape[0] < tokens or self._rope[0].device != device:
            # A power of two, so that inputs that grow token by token need few tables.
            size = 1 << (tokens - 1).bit_length()
            # Later calls may save the tables for a backward pass, which a tensor of inference mode forbids.
            with torch.inference_mode(False):
                self._rope = rope_tables(size, config.rope_dims, base=config.rope_base, device=device)
        return self._rope[0][:tokens], self._rope[1][:tokens]

    def _kernels(self) -> Kernels:
        if self._attention is None:
            self.prepare(self.tok_emb.device)
        assert self._attention is not None
        return Kernels(self._attention, self._mlp, self._mix, self._branch)

    def _run_serial(
        self,
        x: Tensor,
        skip: Skip | None,
        i: int,
        w: LayerWeights,
        ctx: Context,
        observe: Observe | None,
        again: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Context]:
        """Run a serial block; return its output, and x and the context for later readers, see `Threads`."""
        joint = i >= self.config.parallel_from and not self.config.lanes
        inputs = (self.config, self._kernels(), x, skip, w, ctx, self._exclusive(i), joint, _tap(observe, i))
        if self._threads is not None and observe is None and torch.is_grad_enabled():
            return self._threads.serial(again, *inputs)
        block = self._serial if observe is None else serial_block
        return block(*inputs), x, ctx

    def _run_parallel(
        self,
        lanes: tuple[Tensor, Tensor],
        skip: Skip | None,
        i: int,
        w: LayerWeights,
        ctx: Context,
        observe: Observe | None,
        again: bool,
    ) -> tuple[tuple[Tensor, Tensor], Context]:
        """Run a parallel block; return the lanes, and the context for later readers."""
        inputs = (self.config, self._kernels(), lanes, skip, w, ctx, self._exclusive(i), _tap(observe, i))
        if self._threads is not None and observe is None and torch.is_grad_enabled():
            return self._threads.parallel(again, *inputs)
        block = self._parallel if observe is None else parallel_block
        return block(*inputs), ctx

    def _exclusive(self, i: int) -> bool:
        return i >= self.config.layers - self.config.xsa_layers

    def _skip(self, j: int, saved: Tensor) -> Skip | None:
        """Return the skip into layer number `j` of the decoder half."""
        if self.config.skip == "none":
            return None
        return Skip(saved, self.skip_weights[j], self.skip_gates[j] if self.config.skip == "gated" else None)


def _adapt(w: LayerWeights, adapters: Adapters | None, slot: int) -> LayerWeights:
    """Return the weights of a layer together with the adapters of execution number `slot`."""
    return w if adapters is None else w._replace(lora=adapters.layers[slot])


def _tap(observe: Observe | None, layer: int) -> Tap:
    return None if observe is None else lambda kind, x: observe(kind, layer, x)
