// Hopper kernel of qkv_rope.h: a product with an epilogue.
//
// A tile of 128 columns is two heads, both of q, both of k or both of v. Of a head, the four lanes of a row
// hold eight columns each of the first 32 and of the last 32, so its sum of squares takes two shuffles. The
// rotated columns are those of lane 0 with those of lane 1, which exchange them as they are written, two to a
// word. Cosines and sines wait in registers while the tile is multiplied.
#include <cuda.h>

#include "kernels/product_rows.cuh"
#include "kernels/qkv_rope.h"

namespace pgolf {
namespace {

using product::eight_columns;
using product::first_element;
using product::kFragments;
using product::kRows;
using product::kTile;
using product::late_place;
using product::Place;
using product::row_of;

constexpr int kWidth = 64;  // of a head
constexpr int kHeads = kTile / kWidth;
constexpr int kDims = 16;  // rotated columns of a head, if any
constexpr int kHalf = kDims / 2;
constexpr uint32_t kSigns = 0x80008000u;  // of both numbers of a word

struct RopeArgs {
  const uint32_t* gain;  // words
  const float* cos;      // null: no column is rotated
  const float* sin;
  bf16* qkv;
  bf16* q;
  bf16* k;
  int rows, column_tiles;
  int q_tiles, k_tiles;  // of column_tiles
  bool gain_is_bf16;
  float eps;
};

__device__ __forceinline__ float half_of(uint32_t word, int e) {
  return __uint_as_float(e == 0 ? word << 16 : word & 0xffff0000u);
}

__device__ __forceinline__ void widen(float (&x)[8], const uint32_t (&word)[4]) {
  PGOLF_UNROLL
  for (int i = 0; i < 8; ++i) x[i] = half_of(word[i / 2], i % 2);
}

__device__ __forceinline__ void round_to(uint32_t (&word)[4], const float (&x)[8]) {
  PGOLF_UNROLL
  for (int j = 0; j < 4; ++j) word[j] = pack_bfloat16(x[2 * j], x[2 * j + 1]);
}

__device__ __forceinline__ void store(bf16* to, const uint32_t (&word)[4]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ __forceinline__ float add_squares(float sum, const float (&x)[8]) {
  PGOLF_UNROLL
  for (int i = 0; i < 8; ++i) sum = fmaf(x[i], x[i], sum);
  return sum;
}

struct QkvRopeEpilogue {
  using Form = product::WholeTile;
  using Args = RopeArgs;
  uint4 cos[kRows][2], sin[kRows][2];  // 1 and 0 for columns that are not rotated
  uint32_t gain[kHeads];               // bits of float32, or in the first word two of bfloat16

  __device__ __forceinline__ void fetch(const Args& args, const Place& place) {
    const int lane = lane_index() % 4;
    const bool rotated =
        lane * 8 < kDims && args.cos != nullptr && place.column_tile < args.q_tiles + args.k_tiles;
    PGOLF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int row = row_of(place, r);
      const bool wanted = rotated && row < args.rows;
      PGOLF_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int64_t at = static_cast<int64_t>(row) * kHalf + i * 4;
        const uint32_t one = __float_as_uint(1.0f);
        cos[r][i] = wanted ? fetch16(args.cos + at) : make_uint4(one, one, one, one);
        sin[r][i] = wanted ? fetch16(args.sin + at) : make_uint4(0, 0, 0, 0);
      }
    }
    const bool of_q = place.column_tile < args.q_tiles;
    PGOLF_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      const int at = args.gain_is_bf16 ? place.column_tile : place.column_tile * kHeads + h;
      gain[h] = of_q ? fetch4(args.gain + at) : 0;
    }
  }

  __device__ __forceinline__ float gain_of(const Args& args, const Place& place, int head) const {
    if (place.column_tile >= args.q_tiles) return 1.0f;
    return args.gain_is_bf16 ? half_of(gain[0], head) : __uint_as_float(gain[head]);
  }

  __device__ __forceinline__ void finish(const Args& args, const float (&c)[kFragments][64],
                                         const Place& place) const {
    if (place.column_tile >= args.q_tiles + args.k_tiles) {
      PGOLF_UNROLL
      for (int r = 0; r < kRows; ++r) finish_row<false>(args, c[r / 2], late_place(place), r);
    } else {
      PGOLF_UNROLL
      for (int r = 0; r < kRows; ++r) finish_row<true>(args, c[r / 2], late_place(place), r);
    }
  }

  // Normed: the row is of q or k, otherwise of v.
  template <bool Normed>
  __device__ __forceinline__ void finish_row(const Args& args, const float (&c)[64], const Place& place,
                                             int r) const {
    const bool inside = row_of(place, r) < args.rows;
    bf16* const raw = args.qkv + first_element(place, r, args.column_tiles);
    const bool of_q = place.column_tile < args.q_tiles;
    const Place own{place.row, of_q ? place.column_tile : place.column_tile - args.q_tiles, place.block};
    bf16* const to = (of_q ? args.q : args.k) + first_element(own, r, of_q ? args.q_tiles : args.k_tiles);
    PGOLF_UNROLL
    for (int head = 0; head < kHeads; ++head) {
      uint32_t word[2][4];  // columns 8 t .. 8 t + 7 of each half of the head
      PGOLF_UNROLL
      for (int i = 0; i < 2; ++i) {
        float v[8];
        eight_columns(v, c, r % 2, head * 2 + i);
        round_to(word[i], v);
        if (inside) store(raw + head * kWidth + i * 32, word[i]);
      }
      if constexpr (Normed) {
        norm_and_rotate(word, r, gain_of(args, place, head), args.eps);
        PGOLF_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (inside) store(to + head * kWidth + i * 32, word[i]);
        }
      }
    }
  }

  // All lanes of the warp call it.
  __device__ __forceinline__ void norm_and_rotate(uint32_t (&word)[2][4], int r, float factor,
                                                  float eps) const {
    float first[8], last[8], partner[8];
    widen(first, word[0]);
    widen(last, word[1]);
    float squares = add_squares(0.0f, first) + add_squares(0.0f, last);
    // In the order of head_rows.cuh.
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    factor *= rsqrtf(squares * (1.0f / kWidth) + eps);

    // (x1, x2) -> (x1 cos + x2 sin, x2 cos - x1 sin): the minus goes along with x1.
    const int lane = lane_index(), t = lane % 4;
    const uint32_t sign = t == 0 ? kSigns : 0;
    uint32_t other[4];
    PGOLF_UNROLL
    for (int j = 0; j < 4; ++j) {
      other[j] = __shfl_sync(0xffffffffu, word[0][j] ^ sign, t < 2 ? lane ^ 1 : lane);
    }
    widen(partner, other);
    const uint32_t cosines[8] = {cos[r][0].x, cos[r][0].y, cos[r][0].z, cos[r][0].w,
                                 cos[r][1].x, cos[r][1].y, cos[r][1].z, cos[r][1].w};
    const uint32_t sines[8] = {sin[r][0].x, sin[r][0].y, sin[r][0].z, sin[r][0].w,
                               sin[r][1].x, sin[r][1].y, sin[r][1].z, sin[r][1].w};
    PGOLF_UNROLL
    for (int i = 0; i < 8; ++i) {
      first[i] = factor * fmaf(partner[i], __uint_as_float(sines[i]), first[i] * __uint_as_float(cosines[i]));
      last[i] *= factor;
    }
    round_to(word[0], first);
    round_to(word[1], last);
  }
};

}  // namespace

bool qkv_rope_sm90_supports(const QkvRopeShape& shape) {
  constexpr int64_t kMaxTokens = int64_t{1} << 24;
  constexpr int kMaxHeads = 1 << 10;
  return shape.depth % 8 == 0 && shape.depth > 0 && shape.depth <= product::kMaxSlices * product::kDepth &&
         shape.width == kWidth && (shape.dims == kDims || shape.dims == 0) && shape.heads % kHeads == 0 &&
         shape.groups % kHeads == 0 && shape.heads > 0 && shape.groups > 0 && shape.heads <= kMaxHeads &&
         shape.groups <= kMaxHeads && shape.heads + 2 * shape.groups >= 4 * kHeads &&
         shape.tokens <= kMaxTokens && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

void qkv_rope_sm90(const QkvRope& in, const QkvRopeShape& shape, CUstream_st* stream) {
  if (shape.tokens == 0) return;
  const int64_t columns = int64_t{shape.heads + 2 * shape.groups} * kWidth;
  const RopeArgs args{.gain = static_cast<const uint32_t*>(in.gain),
                      .cos = shape.dims == 0 ? nullptr : in.cos,
                      .sin = in.sin,
                      .qkv = in.qkv,
                      .q = in.q,
                      .k = in.k,
                      .rows = static_cast<int>(shape.tokens),
                      .column_tiles = static_cast<int>(columns / kTile),
                      .q_tiles = shape.heads / kHeads,
                      .k_tiles = shape.groups / kHeads,
                      .gain_is_bf16 = in.gain_is_bf16,
                      .eps = in.eps};
  product::launch<QkvRopeEpilogue>(
      {.left = in.n, .right = in.weight, .rows = shape.tokens, .columns = columns, .depth = shape.depth},
      args, stream);
}

}  // namespace pgolf
