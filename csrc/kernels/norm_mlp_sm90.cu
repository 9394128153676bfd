// Hopper kernels of norm_mlp.h: the row statistics, and two products with epilogues.
//
// Outputs of bf16 go from registers to memory 16 bytes at a time. What the second product reads of the first
// one's output waits in registers, as many bytes as would else be staged in shared memory.
#include <cuda.h>

#include "kernels/norm_mlp.h"
#include "kernels/product_rows.cuh"

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

// The word of this thread's signs of a row.
__device__ __forceinline__ int64_t sign_word(const Place& place, int r, int column_tiles) {
  const int64_t tile = static_cast<int64_t>(place.block) * column_tiles + place.column_tile;
  return tile * 512 + r * 128 + static_cast<int>(threadIdx.x % 128);
}

__device__ __forceinline__ float add_squares(float sum, uint4 v) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
  PGOLF_UNROLL
  for (int j = 0; j < 4; ++j) {
    const float low = __uint_as_float(word[j] << 16), high = __uint_as_float(word[j] & 0xffff0000u);
    sum = fmaf(low, low, sum);
    sum = fmaf(high, high, sum);
  }
  return sum;
}
__device__ __forceinline__ float inverse_rms(float squares, int width, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
}

struct UpArgs {
  const float* rho;
  bf16* act;
  uint32_t* signs;
  int rows, column_tiles;
  float slope;
};

struct UpEpilogue {
  using Form = product::WholeTile;
  using Args = UpArgs;
  float rho[kRows];

  __device__ __forceinline__ void fetch(const Args& args, const Place& place) {
    PGOLF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int row = row_of(place, r);
      rho[r] = row < args.rows ? __uint_as_float(fetch4(args.rho + row)) : 0.0f;
    }
  }

  __device__ __forceinline__ void finish(const Args& args, const float (&c)[kFragments][64],
                                         const Place& place) const {
    PGOLF_UNROLL
    for (int r = 0; r < kRows; ++r) finish_row(args, c[r / 2], late_place(place), r);
  }

  __device__ __forceinline__ void finish_row(const Args& args, const float (&c)[64], const Place& place,
                                             int r) const {
    const bool inside = row_of(place, r) < args.rows;
    const float scale = rho[r], below = scale * args.slope;
    bf16* const to = args.act + first_element(place, r, args.column_tiles);
    uint32_t signs = 0;
    PGOLF_UNROLL
    for (int run = 0; run < 4; ++run) {
      float v[8];
      eight_columns(v, c, r % 2, run);
      uint32_t word[4];
      PGOLF_UNROLL
      for (int j = 0; j < 4; ++j) {
        float pair[2];
        PGOLF_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float x = v[j * 2 + e];
          // The slope is at most 1, so the larger one is the leaky ReLU.
          const float leaky = fmaxf(x * scale, x * below);
          pair[e] = leaky * leaky;
          signs = __funnelshift_l(__float_as_uint(x), signs, 1);
        }
        word[j] = pack_bfloat16(pair[0], pair[1]);
      }
      if (inside) {
        *reinterpret_cast<uint4*>(to + run * 32) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
    if (inside) args.signs[sign_word(place, r, args.column_tiles)] = signs;
  }
};

struct DactArgs {
  const bf16* act;
  const uint32_t* signs;
  const float* rho;
  bf16* e;
  float* partials;
  int rows, column_tiles;
  float slope;
};

struct DactEpilogue {
  using Form = product::WholeTile;
  using Args = DactArgs;
  uint4 act[kRows][4];
  uint32_t signs[kRows];
  float rho[kRows];

  __device__ __forceinline__ void fetch(const Args& args, const Place& place) {
    PGOLF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int row = row_of(place, r);
      const bool inside = row < args.rows;
      const bf16* const from = args.act + first_element(place, r, args.column_tiles);
      PGOLF_UNROLL
      for (int run = 0; run < 4; ++run) {
        act[r][run] = inside ? fetch16(from + run * 32) : make_uint4(0, 0, 0, 0);
      }
      signs[r] = inside ? fetch4(args.signs + sign_word(place, r, args.column_tiles)) : 0;
      rho[r] = inside ? __uint_as_float(fetch4(args.rho + row)) : 0.0f;
    }
  }

  __device__ __forceinline__ void finish(const Args& args, const float (&c)[kFragments][64],
                                         const Place& place) const {
    PGOLF_UNROLL
    for (int r = 0; r < kRows; ++r) finish_row(args, c[r / 2], late_place(place), r);
  }

  __device__ __forceinline__ void finish_row(const Args& args, const float (&c)[64], const Place& place,
                                             int r) const {
    const bool inside = row_of(place, r) < args.rows;
    const float above = 2.0f * rho[r], below = -args.slope * above;
    bf16* const to = args.e + first_element(place, r, args.column_tiles);
    float sums[2] = {};
    PGOLF_UNROLL
    for (int run = 0; run < 4; ++run) {
      float v[8];
      eight_columns(v, c, r % 2, run);
      const uint32_t from[4] = {act[r][run].x, act[r][run].y, act[r][run].z, act[r][run].w};
      uint32_t word[4];
      PGOLF_UNROLL
      for (int j = 0; j < 4; ++j) {
        float pair[2];
        PGOLF_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float q = v[j * 2 + e];
          const float a = __uint_as_float(e == 0 ? from[j] << 16 : from[j] & 0xffff0000u);
          const float rate = (signs[r] & (1u << (31 - (run * 8 + j * 2 + e)))) != 0 ? below : above;
          pair[e] = q * sqrt_approx(a) * rate;
          sums[e] = fmaf(q, a, sums[e]);
        }
        word[j] = pack_bfloat16(pair[0], pair[1]);
      }
      if (inside) {
        *reinterpret_cast<uint4*>(to + run * 32) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
    // Four neighbouring lanes hold one row.
    float sum = sums[0] + sums[1];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane_index() % 4 == 0 && inside) {
      args.partials[static_cast<int64_t>(place.column_tile) * args.rows + row_of(place, r)] = 2.0f * sum;
    }
  }
};

constexpr int kWarpsPerBlock = 8;

// A warp for each row.
__global__ void __launch_bounds__(kWarpsPerBlock * 32)
    rho_kernel(const uint4* __restrict__ x, float* __restrict__ rho, int rows, int chunks, float eps) {
  const int row = static_cast<int>(blockIdx.x) * kWarpsPerBlock + static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= rows) return;
  float sum = 0.0f;
  _Pragma("unroll 2") for (int i = lane; i < chunks; i += 32) {
    sum = add_squares(sum, x[static_cast<int64_t>(row) * chunks + i]);
  }
  PGOLF_UNROLL
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane == 0) rho[row] = inverse_rms(sum, chunks * 8, eps);
}

}  // namespace

bool norm_mlp_sm90_supports(const NormMlpShape& shape) {
  constexpr int64_t kMaxRows = int64_t{1} << 24, kMaxHidden = int64_t{1} << 16;
  return shape.width % 8 == 0 && shape.width > 0 && shape.width <= product::kMaxSlices * product::kDepth &&
         shape.hidden % kTile == 0 && shape.hidden >= 4 * kTile && shape.hidden <= kMaxHidden &&
         shape.rows <= kMaxRows && shape.slope >= 0.0f && shape.slope <= 1.0f &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

void norm_mlp_up_sm90(const NormMlpUp& in, const NormMlpShape& shape, CUstream_st* stream) {
  if (shape.rows == 0) return;
  const unsigned int blocks = grid_blocks(shape.rows, kWarpsPerBlock, "norm_mlp");
  launch_kernel(rho_kernel, {blocks, kWarpsPerBlock * 32}, stream, reinterpret_cast<const uint4*>(in.x),
                in.rho, static_cast<int>(shape.rows), static_cast<int>(shape.width / 8), in.eps);
  const UpArgs args{.rho = in.rho,
                    .act = in.act,
                    .signs = in.signs,
                    .rows = static_cast<int>(shape.rows),
                    .column_tiles = static_cast<int>(shape.hidden / kTile),
                    .slope = shape.slope};
  product::launch<UpEpilogue>(
      {.left = in.x, .right = in.up, .rows = shape.rows, .columns = shape.hidden, .depth = shape.width}, args,
      stream);
}

void norm_mlp_dact_sm90(const NormMlpDact& in, const NormMlpShape& shape, CUstream_st* stream) {
  if (shape.rows == 0) return;
  const DactArgs args{.act = in.act,
                      .signs = in.signs,
                      .rho = in.rho,
                      .e = in.e,
                      .partials = in.partials,
                      .rows = static_cast<int>(shape.rows),
                      .column_tiles = static_cast<int>(shape.hidden / kTile),
                      .slope = shape.slope};
  product::launch<DactEpilogue>(
      {.left = in.grad, .right = in.down, .rows = shape.rows, .columns = shape.hidden, .depth = shape.width},
      args, stream);
}

}  // namespace pgolf
