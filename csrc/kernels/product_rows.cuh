// What the epilogues of product_sm90.cuh share: which rows and columns a thread holds.
#pragma once

#include "kernels/linear_softcap_ce_epilogue.cuh"
#include "kernels/product_sm90.cuh"

namespace pgolf::product {

// Of tiles of 128 x 128 that a warpgroup multiplies alone.
using WholeTile = Form<kTile, 1, true, true>;
inline constexpr int kFragments = WholeTile::kFragments;
inline constexpr int kRows = 2 * kFragments;  // of a thread

// Rows of a thread: two of each fragment, 8 and 64 apart.
__device__ __forceinline__ int row_of(const Place& place, int r) {
  return place.row + r / 2 * 64 + r % 2 * 8;
}

// Columns 32 run + 8 t .. 8 t + 7 of one of the two rows that a thread of lane 4 g + t holds of a fragment.
__device__ __forceinline__ void eight_columns(float (&v)[8], const float (&c)[64], int half, int run) {
  PGOLF_UNROLL
  for (int i = 0; i < 8; ++i) v[i] = c[run * 16 + i / 2 * 4 + half * 2 + i % 2];
}

// A thread's place that the compiler computes where it is used, not before the product: all registers are
// taken there.
__device__ __forceinline__ Place late_place(const Place& place) {
  return {epilogue::late(place.row), place.column_tile, place.block};
}

// First element of a thread's part of a row.
__device__ __forceinline__ int64_t first_element(const Place& place, int r, int column_tiles) {
  return static_cast<int64_t>(row_of(place, r)) * (column_tiles * kTile) + place.column_tile * kTile +
         lane_index() % 4 * 8;
}

}  // namespace pgolf::product
