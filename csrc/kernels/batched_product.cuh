// Batched float16 matrix product on tensor cores (mma.sync, sm_80 and newer), float32 accumulation:
//
//   C[i] = alpha * A[i] B[i] + beta * D[i]       A (m, k), B (k, n), C and D (m, n), for each i of a batch
//
// A block computes one tile of C with four warps; a ring of kStages slices of A and B is filled by cp.async.
// A, B and D are float16 and row-major with a leading dimension that is a multiple of 8 elements, 16-byte
// aligned, and zeros between the last column and the leading dimension; a float16 C with such a leading
// dimension keeps those zeros. Any m, n, k. C is rounded once, to T. D may have a remainder: what its
// rounding to float16 took away, times kRestScale, in float16 itself; the remainder of C can be kept
// likewise. Layout of an operand: `AlongK` says that its rows run along k (A as (m, k), B stored as (n, k));
// otherwise its rows are k (A stored as (k, m), B as (k, n)). Symmetric: the caller knows that C is
// symmetric. Only tiles on and above the diagonal are computed; the others are stored as their mirror images.
// Deterministic: no atomics, no split along k.
#pragma once

#include <type_traits>

#include "kernels/common.h"
#include "kernels/convert.cuh"
#include "kernels/cuda_check.cuh"
#include "kernels/ptx.cuh"

namespace pgolf {

// A remainder is at most half a unit in the last place of its float16: this brings it to the same magnitude.
inline constexpr float kRestScale = 2048.0f;

template <typename T>
struct ProductArgs {
  const __half* a;
  const __half* b;
  const __half* d = nullptr;       // null: beta is 0
  const __half* d_rest = nullptr;  // remainder of D, laid out as D; null: there is none
  T* c;
  __half* c_rest = nullptr;  // remainder of a float16 C, laid out as C, may be d_rest; null: not kept
  int64_t a_batch, b_batch, d_batch = 0, c_batch;  // elements from one matrix of the batch to the next
  int64_t a_ld, b_ld, d_ld = 0, c_ld;              // leading dimensions, elements
  int64_t m, n, k;
  float alpha = 1.0f, beta = 0.0f;
  const float* sigma = nullptr;  // one per matrix; alpha and beta are multiplied by powers of it
  int alpha_power = 0, beta_power = 0;
  bool whole = true;  // C can be stored in chunks of eight elements
};

namespace product {

constexpr int kThreads = 128;  // 2 x 2 warps
constexpr int kDepth = 32;     // slice of k, elements
constexpr int kStages = 4;
constexpr int kChunk = 8;  // elements in 16 bytes

// Shared-memory image of one operand's slice. Rows of 16-byte chunks, swizzled so that the eight rows that
// ldmatrix reads at once lie in different banks.
template <bool AlongK, int Extent>
struct Slice {
  static constexpr int kRows = AlongK ? Extent : kDepth;
  static constexpr int kChunksPerRow = (AlongK ? kDepth : Extent) / kChunk;
  static constexpr int kElements = Extent * kDepth;

  // Offset in bytes. Rows of 4 chunks (64 bytes) come in pairs per 128-byte line, hence row / 2.
  __device__ static uint32_t offset(int row, int chunk) {
    const int swizzled = AlongK ? chunk ^ (row / 2 % 4) : chunk ^ (row % 8);
    return static_cast<uint32_t>((row * kChunksPerRow + swizzled) * 16);
  }

  // Starts the copy of the slice at `depth` along k and `origin` along the other side; `extent` and `k` are
  // the operand's sizes. Rows past the end and chunks past the leading dimension become zeros.
  __device__ static void load(uint32_t shared, const __half* matrix, int64_t ld, int64_t origin,
                              int64_t extent, int64_t depth, int64_t k) {
    const int64_t first_row = AlongK ? origin : depth;
    const int64_t first_column = AlongK ? depth : origin;
    const int64_t rows = AlongK ? extent : k;
    PGOLF_UNROLL
    for (int i = 0; i < kRows * kChunksPerRow / kThreads; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x);
      const int row = index / kChunksPerRow;
      const int chunk = index % kChunksPerRow;
      const int64_t r = first_row + row;
      const int64_t column = first_column + chunk * kChunk;
      const bool valid = r < rows && column < ld;
      cp_async16(shared + offset(row, chunk), valid ? matrix + r * ld + column : matrix, valid);
    }
  }
};

// Fragments of A for rows [row, row + 16) and of k for [depth, depth + 16).
template <typename SliceA, bool AlongK>
__device__ __forceinline__ void load_a(uint32_t (&fragment)[4], uint32_t shared, int row, int depth,
                                       int lane) {
  const int in8 = lane % 8, odd = lane / 8 % 2, upper = lane / 16;
  if constexpr (AlongK) {
    ldmatrix_x4<false>(fragment, shared + SliceA::offset(row + in8 + odd * 8, depth / kChunk + upper));
  } else {
    ldmatrix_x4<true>(fragment, shared + SliceA::offset(depth + in8 + upper * 8, row / kChunk + odd));
  }
}

// Fragments of B for k in [depth, depth + 16) and columns [column, column + 16): b0, b1 of the first eight
// columns, then of the second eight.
template <typename SliceB, bool AlongK>
__device__ __forceinline__ void load_b(uint32_t (&fragment)[4], uint32_t shared, int column, int depth,
                                       int lane) {
  const int in8 = lane % 8, odd = lane / 8 % 2, upper = lane / 16;
  if constexpr (AlongK) {
    ldmatrix_x4<false>(fragment, shared + SliceB::offset(column + in8 + upper * 8, depth / kChunk + odd));
  } else {
    ldmatrix_x4<true>(fragment, shared + SliceB::offset(depth + in8 + odd * 8, column / kChunk + upper));
  }
}

// A Tile x Tile block of D or C in shared memory, 16-bit elements in chunks of eight, swizzled so that both
// row and column walks of a warp hit different banks.
template <int Tile>
struct Staging {
  static constexpr int kElements = Tile * Tile;
  static constexpr int kChunks = kElements / kChunk / kThreads;

  __device__ static int offset(int row, int column) {
    return row * Tile + ((column / kChunk) ^ (row % 8)) * kChunk + column % kChunk;
  }

  // Starts the copy of the block at (row, column) of a (rows, ld) matrix; outside becomes zeros.
  __device__ static void load(__half* staged, const __half* matrix, int64_t ld, int64_t row, int64_t column,
                              int64_t rows) {
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x);
      const int r = index / (Tile / kChunk), c = index % (Tile / kChunk) * kChunk;
      const bool valid = row + r < rows && column + c < ld;
      cp_async16(shared_address(staged + offset(r, c)), valid ? matrix + (row + r) * ld + column + c : matrix,
                 valid);
    }
  }

  // `whole`: ld is a multiple of kChunk and the matrix 16-byte aligned.
  template <typename T>
  __device__ static void store(const T* staged, T* matrix, int64_t ld, int64_t row, int64_t column,
                               int64_t rows, bool whole) {
    if (!whole) {
      for (int index = static_cast<int>(threadIdx.x); index < kElements; index += kThreads) {
        const int r = index / Tile, c = index % Tile;
        if (row + r < rows && column + c < ld) matrix[(row + r) * ld + column + c] = staged[offset(r, c)];
      }
      return;
    }
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x);
      const int r = index / (Tile / kChunk), c = index % (Tile / kChunk) * kChunk;
      if (row + r < rows && column + c < ld) {
        *reinterpret_cast<Pack<T>*>(matrix + (row + r) * ld + column + c) =
            *reinterpret_cast<const Pack<T>*>(staged + offset(r, c));
      }
    }
  }
};

template <int Tile, bool AAlongK, bool BAlongK>
struct Shape {
  using SliceA = Slice<AAlongK, Tile>;
  using SliceB = Slice<BAlongK, Tile>;
  using Stage = Staging<Tile>;
  static constexpr int kWarpTile = Tile / 2;
  static constexpr int kMmaRows = kWarpTile / 16;
  static constexpr int kMmaColumns = kWarpTile / 8;
  static constexpr int kSliceBytes =
      (SliceA::kElements + SliceB::kElements) * static_cast<int>(sizeof(__half));
  static constexpr int kSharedBytes = kStages * kSliceBytes;
  static constexpr int kBlocksPerSm = Tile == 128 ? 2 : 4;
  static_assert(2 * Stage::kElements * static_cast<int>(sizeof(__half)) <= kSharedBytes,
                "the epilogue reuses the ring, for C and its remainder");
  // Of sm_80 and newer, sm_86, sm_89 and sm_120 give a block least.
  static_assert(kSharedBytes <= 101376,
                "more shared memory than a block of sm_86, sm_89 and sm_120 can have");
};

struct TilePlace {
  int64_t row, column, batch;  // first row and column of the tile, index of the matrix
};

// Block index -> tile. Symmetric grids count the upper triangle row by row.
template <int Tile, bool Symmetric>
__device__ __forceinline__ TilePlace tile_place(int64_t m, int64_t n) {
  const int64_t across = (n + Tile - 1) / Tile;
  const int64_t down = (m + Tile - 1) / Tile;
  const int64_t tiles = Symmetric ? down * (down + 1) / 2 : down * across;
  const int64_t batch = blockIdx.x / tiles;
  int64_t index = blockIdx.x - batch * tiles;
  if constexpr (!Symmetric) return {index / across * Tile, index % across * Tile, batch};
  int64_t i = 0;
  for (; index >= down - i; ++i) index -= down - i;
  return {i * Tile, (i + index) * Tile, batch};
}

// One warp's sums of a tile: rows and columns of 16x8 products.
template <typename S>
using Sums = float[S::kMmaRows][S::kMmaColumns][4];

// Where a warp's part of the tile starts.
struct WarpPlace {
  int row, column, lane;
};

// Calls body(row, column, x, y) for each two neighbouring sums of this thread; (row, column) in the tile.
template <typename S, typename Body>
__device__ __forceinline__ void for_each_pair(Sums<S>& sum, WarpPlace warp, const Body& body) {
  PGOLF_UNROLL
  for (int i = 0; i < S::kMmaRows; ++i) {
    PGOLF_UNROLL
    for (int j = 0; j < S::kMmaColumns; ++j) {
      PGOLF_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = warp.row + i * 16 + warp.lane / 4 + half * 8;
        const int column = warp.column + j * 8 + warp.lane % 4 * 2;
        body(row, column, sum[i][j][half * 2], sum[i][j][half * 2 + 1]);
      }
    }
  }
}

// Two neighbouring elements, moved by one instruction.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

__device__ __forceinline__ float power(float x, int n) {
  return n == 0 ? 1.0f : n == 1 ? x : n == 2 ? x * x : (x * x) * (x * x);
}

// alpha sum + beta D, in float32. D and its remainder wait in shared memory.
template <typename T, typename S>
__device__ __forceinline__ void add_d(const ProductArgs<T>& args, int64_t batch, const __half* staged,
                                      const __half* rest, Sums<S>& sum, WarpPlace warp) {
  const float sigma = args.sigma == nullptr ? 1.0f : args.sigma[batch];
  const float alpha = args.alpha * power(sigma, args.alpha_power);
  const float beta = args.beta * power(sigma, args.beta_power);
  const auto add = [&](const __half* matrix, float factor) {
    for_each_pair<S>(sum, warp, [&](int row, int column, float& x, float& y) {
      const auto pair = *reinterpret_cast<const Pair<__half>*>(matrix + S::Stage::offset(row, column));
      x = fmaf(factor, load_float(pair.x), x);
      y = fmaf(factor, load_float(pair.y), y);
    });
  };
  for_each_pair<S>(sum, warp, [&](int, int, float& x, float& y) {
    x *= alpha;
    y *= alpha;
  });
  // The smaller number first.
  if (rest != nullptr) add(rest, beta / kRestScale);
  if (args.d != nullptr) add(staged, beta);
}

// The sums to shared memory, rounded; remainders likewise, where there is a place for them.
template <typename T, typename S>
__device__ __forceinline__ void stage_sums(T* staged, __half* rest, Sums<S>& sum, WarpPlace warp) {
  for_each_pair<S>(sum, warp, [&](int row, int column, float& x, float& y) {
    *reinterpret_cast<Pair<T>*>(staged + S::Stage::offset(row, column)) = {store_float<T>(x),
                                                                           store_float<T>(y)};
  });
  if (rest == nullptr) return;
  for_each_pair<S>(sum, warp, [&](int row, int column, float& x, float& y) {
    *reinterpret_cast<Pair<__half>*>(rest + S::Stage::offset(row, column)) = {
        store_float<__half>((x - load_float(store_float<T>(x))) * kRestScale),
        store_float<__half>((y - load_float(store_float<T>(y))) * kRestScale)};
  });
}

// float32 goes out directly: four lanes fill a sector of 32 bytes.
template <typename S>
__device__ __forceinline__ void store_floats(const ProductArgs<float>& args, TilePlace place, Sums<S>& sum,
                                             WarpPlace warp) {
  float* const c = args.c + place.batch * args.c_batch;
  for_each_pair<S>(sum, warp, [&](int row, int column, float& x, float& y) {
    const int64_t r = place.row + row, left = args.c_ld - place.column - column;
    if (r >= args.m || left <= 0) return;
    float* const at = c + r * args.c_ld + place.column + column;
    if (args.whole) {
      *reinterpret_cast<Pair<float>*>(at) = {x, y};
      return;
    }
    at[0] = x;
    if (left > 1) at[1] = y;
  });
}

// 16-bit elements go out through shared memory, in whole chunks where they can. Symmetric: off the diagonal
// the transpose goes to the mirrored place, too; C has no remainder and is whole.
template <typename T, typename S, bool Symmetric>
__device__ __forceinline__ void store_tile(const ProductArgs<T>& args, TilePlace place, __half* staged,
                                           Sums<S>& sum, WarpPlace warp) {
  __half* const rest = staged + S::Stage::kElements;
  const bool d_rest = !Symmetric && args.d_rest != nullptr;
  const bool c_rest = !Symmetric && std::is_same_v<T, __half> && args.c_rest != nullptr;
  if (args.d != nullptr) {
    const int64_t first = place.batch * args.d_batch;
    S::Stage::load(staged, args.d + first, args.d_ld, place.row, place.column, args.m);
    if (d_rest) S::Stage::load(rest, args.d_rest + first, args.d_ld, place.row, place.column, args.m);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
  add_d<T, S>(args, place.batch, staged, d_rest ? rest : nullptr, sum, warp);
  if constexpr (std::is_same_v<T, float>) {
    store_floats<S>(args, place, sum, warp);
  } else {
    T* const out = reinterpret_cast<T*>(staged);
    const int64_t first = place.batch * args.c_batch;
    const bool whole = Symmetric || args.whole;
    stage_sums<T, S>(out, c_rest ? rest : nullptr, sum, warp);
    __syncthreads();
    S::Stage::store(out, args.c + first, args.c_ld, place.row, place.column, args.m, whole);
    if (c_rest) S::Stage::store(rest, args.c_rest + first, args.c_ld, place.row, place.column, args.m, whole);
    if (!Symmetric || place.row == place.column) return;
    __syncthreads();
    for_each_pair<S>(sum, warp, [&](int row, int column, float& x, float& y) {
      out[S::Stage::offset(column, row)] = store_float<T>(x);
      out[S::Stage::offset(column + 1, row)] = store_float<T>(y);
    });
    __syncthreads();
    S::Stage::store(out, args.c + first, args.c_ld, place.column, place.row, args.n, whole);
  }
}

template <typename T, int Tile, bool AAlongK, bool BAlongK, bool Symmetric>
__global__ void __launch_bounds__(kThreads, Shape<Tile, AAlongK, BAlongK>::kBlocksPerSm)
    product_kernel(const __grid_constant__ ProductArgs<T> args) {
  using S = Shape<Tile, AAlongK, BAlongK>;
  unsigned char* const shared_bytes = dynamic_shared();
  const uint32_t ring = shared_address(shared_bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const WarpPlace mine{warp / 2 * S::kWarpTile, warp % 2 * S::kWarpTile, lane};
  const TilePlace place = tile_place<Tile, Symmetric>(args.m, args.n);
  const __half* a = args.a + place.batch * args.a_batch;
  const __half* b = args.b + place.batch * args.b_batch;
  const int slices = static_cast<int>((args.k + kDepth - 1) / kDepth);

  auto start_slice = [&](int slice) {
    if (slice < slices) {
      const uint32_t at = ring + slice % kStages * S::kSliceBytes;
      const int64_t depth = static_cast<int64_t>(slice) * kDepth;
      S::SliceA::load(at, a, args.a_ld, place.row, args.m, depth, args.k);
      S::SliceB::load(at + S::SliceA::kElements * sizeof(__half), b, args.b_ld, place.column, args.n, depth,
                      args.k);
    }
    cp_async_commit();  // empty groups keep the count of groups equal to the count of slices
  };

  Sums<S> sum = {};
  for (int slice = 0; slice < kStages - 1; ++slice) start_slice(slice);
  for (int slice = 0; slice < slices; ++slice) {
    cp_async_wait<kStages - 2>();
    // The slice has arrived for all threads, and all have finished reading slice - 1, whose place is
    // refilled.
    __syncthreads();
    start_slice(slice + kStages - 1);
    const uint32_t at_a = ring + slice % kStages * S::kSliceBytes;
    const uint32_t at_b = at_a + S::SliceA::kElements * sizeof(__half);
    PGOLF_UNROLL
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t fa[S::kMmaRows][4], fb[S::kMmaColumns / 2][4];
      PGOLF_UNROLL
      for (int i = 0; i < S::kMmaRows; ++i) {
        load_a<typename S::SliceA, AAlongK>(fa[i], at_a, mine.row + i * 16, depth, mine.lane);
      }
      PGOLF_UNROLL
      for (int j = 0; j < S::kMmaColumns / 2; ++j) {
        load_b<typename S::SliceB, BAlongK>(fb[j], at_b, mine.column + j * 16, depth, mine.lane);
      }
      PGOLF_UNROLL
      for (int i = 0; i < S::kMmaRows; ++i) {
        PGOLF_UNROLL
        for (int j = 0; j < S::kMmaColumns; ++j) {
          mma_16x8x16(sum[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1], __half{});
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the epilogue reuses the ring
  store_tile<T, S, Symmetric>(args, place, reinterpret_cast<__half*>(shared_bytes), sum, mine);
}

template <typename T, int Tile, bool AAlongK, bool BAlongK, bool Symmetric>
void launch_tile(const ProductArgs<T>& args, int64_t batch, cudaStream_t stream) {
  using S = Shape<Tile, AAlongK, BAlongK>;
  const int64_t down = (args.m + Tile - 1) / Tile, across = (args.n + Tile - 1) / Tile;
  const int64_t tiles = Symmetric ? down * (down + 1) / 2 : down * across;
  auto kernel = product_kernel<T, Tile, AAlongK, BAlongK, Symmetric>;
  PGOLF_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes));
  launch_kernel(kernel, {grid_blocks(tiles * batch, 1, "newton_schulz"), kThreads, S::kSharedBytes}, stream,
                args);
}

}  // namespace product

// Launches with 128 x 128 tiles where they fill the device, else with 64 x 64 tiles.
template <bool AAlongK, bool BAlongK, bool Symmetric, typename T>
void launch_product(const ProductArgs<T>& args, int64_t batch, int multiprocessors, cudaStream_t stream) {
  const int64_t down = (args.m + 127) / 128, across = (args.n + 127) / 128;
  const int64_t tiles = (Symmetric ? down * (down + 1) / 2 : down * across) * batch;
  if (tiles >= multiprocessors) {
    product::launch_tile<T, 128, AAlongK, BAlongK, Symmetric>(args, batch, stream);
  } else {
    product::launch_tile<T, 64, AAlongK, BAlongK, Symmetric>(args, batch, stream);
  }
}

}  // namespace pgolf
