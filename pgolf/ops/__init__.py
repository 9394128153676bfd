"""Operators with CPU and CUDA kernels, for eager mode, torch.compile and CUDA graphs."""

from pgolf.ops._extension import KernelRow, kernel_table
from pgolf.ops.adam_step import (
    AdamRule,
    AdamTensor,
    adam_step,
    adam_step_ref,
    clip_scale,
    clip_scale_ref,
    square_sums,
    square_sums_ref,
)
from pgolf.ops.doc_attention import (
    doc_attention,
    doc_attention_backward,
    doc_attention_backward_ref,
    doc_attention_ref,
)
from pgolf.ops.head_mix import head_mix, head_mix_backward, head_mix_backward_ref, head_mix_ref
from pgolf.ops.int6 import (
    pack_int6,
    pack_int6_ref,
    quantize_pack,
    quantize_pack_ref,
    quantize_pack_sdclip,
    quantize_pack_sdclip_ref,
    unpack_dequantize,
    unpack_dequantize_ref,
    unpack_int6,
    unpack_int6_ref,
)
from pgolf.ops.linear_softcap_ce import linear_softcap_ce, linear_softcap_ce_ref
from pgolf.ops.muon_step import (
    MuonBank,
    MuonRule,
    muon_apply,
    muon_apply_ref,
    muon_step,
    muon_step_ref,
)
from pgolf.ops.newton_schulz import (
    newton_schulz,
    newton_schulz_banks,
    newton_schulz_banks_ref,
    newton_schulz_ref,
)
from pgolf.ops.norm_mlp import norm_mlp, norm_mlp_ref
from pgolf.ops.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_backward,
    qk_norm_rope_backward_ref,
    qk_norm_rope_ref,
)
from pgolf.ops.qkv_rope import qkv_rope, qkv_rope_ref
from pgolf.ops.range_coder import decode_codes, decode_codes_ref, encode_codes, encode_codes_ref
from pgolf.ops.softcap_ce import softcap_ce, softcap_ce_ref
from pgolf.ops.stream_mix import stream_mix, stream_mix_ref
from pgolf.ops.trellis import trellis_round, trellis_round_ref, trellis_values, trellis_values_ref

__all__ = [
    "AdamRule",
    "AdamTensor",
    "KernelRow",
    "MuonBank",
    "MuonRule",
    "adam_step",
    "adam_step_ref",
    "clip_scale",
    "clip_scale_ref",
    "decode_codes",
    "decode_codes_ref",
    "doc_attention",
    "doc_attention_backward",
    "doc_attention_backward_ref",
    "doc_attention_ref",
    "encode_codes",
    "encode_codes_ref",
    "head_mix",
    "head_mix_backward",
    "head_mix_backward_ref",
    "head_mix_ref",
    "kernel_table",
    "linear_softcap_ce",
    "linear_softcap_ce_ref",
    "muon_apply",
    "muon_apply_ref",
    "muon_step",
    "muon_step_ref",
    "newton_schulz",
    "newton_schulz_banks",
    "newton_schulz_banks_ref",
    "newton_schulz_ref",
    "norm_mlp",
    "norm_mlp_ref",
    "pack_int6",
    "pack_int6_ref",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "qk_norm_rope_backward_ref",
    "qk_norm_rope_ref",
    "qkv_rope",
    "qkv_rope_ref",
    "quantize_pack",
    "quantize_pack_ref",
    "quantize_pack_sdclip",
    "quantize_pack_sdclip_ref",
    "softcap_ce",
    "softcap_ce_ref",
    "square_sums",
    "square_sums_ref",
    "stream_mix",
    "stream_mix_ref",
    "trellis_round",
    "trellis_round_ref",
    "trellis_values",
    "trellis_values_ref",
    "unpack_dequantize",
    "unpack_dequantize_ref",
    "unpack_int6",
    "unpack_int6_ref",
]
