// Batched 16-bit matrix product on tensor cores (mma.sync, sm_80 and newer), float32 accumulation:
//
//   C[i] = alpha * A[i] B[i] + beta * D[i]       A (m, k), B (k, n), C and D (m, n), for each i of a batch
//
// A block computes one tile of C with four warps; a ring of kStages slices of A and B is filled by cp.async.
// Every matrix is row-major with a leading dimension that is a multiple of 8 elements, 16-byte aligned, and
// zeros between its last column and the leading dimension; C keeps those zeros. Any m, n, k. Layout of an
// operand: `AlongK` says that its rows run along k (A as (m, k), B stored as (n, k)); otherwise its rows are
// k (A stored as (k, m), B as (k, n)). Symmetric: the caller knows that C is symmetric. Only tiles on and
// above the diagonal are computed; the others are stored as their mirror images. Deterministic: no atomics,
// no split along k.
#pragma once

#include "kernels/common.h"
#include "kernels/convert.cuh"
#include "kernels/cuda_check.cuh"
#include "kernels/ptx.cuh"

namespace pgolf {

template <typename D>
struct ProductArgs {
  const D* a;
  const D* b;
  const D* d = nullptr;  // null: beta is 0
  D* c;
  int64_t a_batch, b_batch, d_batch = 0, c_batch;  // elements from one matrix of the batch to the next
  int64_t a_ld, b_ld, d_ld = 0, c_ld;              // leading dimensions, elements
  int64_t m, n, k;
  float alpha = 1.0f, beta = 0.0f;
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
  template <typename D>
  __device__ static void load(uint32_t shared, const D* matrix, int64_t ld, int64_t origin, int64_t extent,
                              int64_t depth, int64_t k) {
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

// A Tile x Tile block of D or C in shared memory; the padding keeps both row and column walks off shared
// banks.
template <typename D, int Tile>
struct Staging {
  static constexpr int kStride = Tile + kChunk;
  static constexpr int kChunks = Tile * Tile / kChunk / kThreads;

  // Starts the copy of the block at (row, column) of a (rows, ld) matrix; outside becomes zeros.
  __device__ static void load(D* staged, const D* matrix, int64_t ld, int64_t row, int64_t column,
                              int64_t rows) {
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x);
      const int r = index / (Tile / kChunk), c = index % (Tile / kChunk) * kChunk;
      const bool valid = row + r < rows && column + c < ld;
      cp_async16(shared_address(staged + r * kStride + c),
                 valid ? matrix + (row + r) * ld + column + c : matrix, valid);
    }
  }

  __device__ static void store(const D* staged, D* matrix, int64_t ld, int64_t row, int64_t column,
                               int64_t rows) {
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kThreads + static_cast<int>(threadIdx.x);
      const int r = index / (Tile / kChunk), c = index % (Tile / kChunk) * kChunk;
      if (row + r < rows && column + c < ld) {
        *reinterpret_cast<Pack<D>*>(matrix + (row + r) * ld + column + c) =
            *reinterpret_cast<const Pack<D>*>(staged + r * kStride + c);
      }
    }
  }
};

template <typename D, int Tile, bool AAlongK, bool BAlongK>
struct Shape {
  using SliceA = Slice<AAlongK, Tile>;
  using SliceB = Slice<BAlongK, Tile>;
  using Stage = Staging<D, Tile>;
  static constexpr int kWarpTile = Tile / 2;
  static constexpr int kMmaRows = kWarpTile / 16;
  static constexpr int kMmaColumns = kWarpTile / 8;
  static constexpr int kSliceBytes = (SliceA::kElements + SliceB::kElements) * static_cast<int>(sizeof(D));
  static constexpr int kSharedBytes = kStages * kSliceBytes;
  static constexpr int kBlocksPerSm = Tile == 128 ? 2 : 4;
  static_assert(Tile * Stage::kStride * static_cast<int>(sizeof(D)) <= kSharedBytes,
                "the epilogue reuses the ring");
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

// alpha sum + beta D goes out through shared memory, so that D and C move in whole 16-byte chunks; where
// `mirror` is set, its transpose goes to the mirrored place, too.
template <typename D, typename S>
__device__ __forceinline__ void store_tile(const ProductArgs<D>& args, TilePlace place, bool mirror,
                                           D* staged, Sums<S>& sum, WarpPlace warp) {
  D* c = args.c + place.batch * args.c_batch;
  if (args.d != nullptr) {
    S::Stage::load(staged, args.d + place.batch * args.d_batch, args.d_ld, place.row, place.column, args.m);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
  for_each_pair<S>(sum, warp, [&](int row, int column, float& x, float& y) {
    D* at = staged + row * S::Stage::kStride + column;
    x *= args.alpha;
    y *= args.alpha;
    if (args.d != nullptr) {
      x = fmaf(args.beta, load_float(at[0]), x);
      y = fmaf(args.beta, load_float(at[1]), y);
    }
    at[0] = store_float<D>(x);
    at[1] = store_float<D>(y);
  });
  __syncthreads();
  S::Stage::store(staged, c, args.c_ld, place.row, place.column, args.m);
  if (!mirror) return;
  __syncthreads();
  for_each_pair<S>(sum, warp, [&](int row, int column, float& x, float& y) {
    staged[column * S::Stage::kStride + row] = store_float<D>(x);
    staged[(column + 1) * S::Stage::kStride + row] = store_float<D>(y);
  });
  __syncthreads();
  S::Stage::store(staged, c, args.c_ld, place.column, place.row, args.n);
}

template <typename D, int Tile, bool AAlongK, bool BAlongK, bool Symmetric>
__global__ void __launch_bounds__(kThreads, Shape<D, Tile, AAlongK, BAlongK>::kBlocksPerSm)
    product_kernel(ProductArgs<D> args) {
  using S = Shape<D, Tile, AAlongK, BAlongK>;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  const uint32_t ring = shared_address(shared_bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const WarpPlace mine{warp / 2 * S::kWarpTile, warp % 2 * S::kWarpTile, lane};
  const TilePlace place = tile_place<Tile, Symmetric>(args.m, args.n);
  const D* a = args.a + place.batch * args.a_batch;
  const D* b = args.b + place.batch * args.b_batch;
  const int slices = static_cast<int>((args.k + kDepth - 1) / kDepth);

  auto start_slice = [&](int slice) {
    if (slice < slices) {
      const uint32_t at = ring + slice % kStages * S::kSliceBytes;
      const int64_t depth = static_cast<int64_t>(slice) * kDepth;
      S::SliceA::load(at, a, args.a_ld, place.row, args.m, depth, args.k);
      S::SliceB::load(at + S::SliceA::kElements * sizeof(D), b, args.b_ld, place.column, args.n, depth,
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
    const uint32_t at_b = at_a + S::SliceA::kElements * sizeof(D);
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
          mma_16x8x16(sum[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1], D{});
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the epilogue reuses the ring
  store_tile<D, S>(args, place, Symmetric && place.row != place.column, reinterpret_cast<D*>(shared_bytes),
                   sum, mine);
}

template <typename D, int Tile, bool AAlongK, bool BAlongK, bool Symmetric>
void launch_tile(const ProductArgs<D>& args, int64_t batch, cudaStream_t stream) {
  using S = Shape<D, Tile, AAlongK, BAlongK>;
  const int64_t down = (args.m + Tile - 1) / Tile, across = (args.n + Tile - 1) / Tile;
  const int64_t tiles = Symmetric ? down * (down + 1) / 2 : down * across;
  auto kernel = product_kernel<D, Tile, AAlongK, BAlongK, Symmetric>;
  PGOLF_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes));
  kernel<<<grid_blocks(tiles * batch, 1, "newton_schulz"), kThreads, S::kSharedBytes, stream>>>(args);
  PGOLF_LAUNCH_CHECK();
}

}  // namespace product

// Launches with 128 x 128 tiles where they fill the device, else with 64 x 64 tiles.
template <bool AAlongK, bool BAlongK, bool Symmetric, typename D>
void launch_product(const ProductArgs<D>& args, int64_t batch, int multiprocessors, cudaStream_t stream) {
  const int64_t down = (args.m + 127) / 128, across = (args.n + 127) / 128;
  const int64_t tiles = (Symmetric ? down * (down + 1) / 2 : down * across) * batch;
  if (tiles >= multiprocessors) {
    product::launch_tile<D, 128, AAlongK, BAlongK, Symmetric>(args, batch, stream);
  } else {
    product::launch_tile<D, 64, AAlongK, BAlongK, Symmetric>(args, batch, stream);
  }
}

}  // namespace pgolf
