// A persistent product of Hopper, a (rows x depth) times b (depth x columns), with an epilogue of the
// caller's. Of a transposed b: product_sm90.cuh.
//
// Blocks come in clusters of two that work on the same 256 rows and neighbouring columns and multicast their
// halves of `a` to each other. One thread feeds a ring of slices of the depth, two warpgroups multiply
// 128 x 128 each and then compute their epilogue, both at the same time.
//
// An epilogue is a class with its Args, whose member `schedule` launch fills in; fetch(args, place), called
// before a tile's product, and finish(args, sum, place), called after it. Each thread has one for each tile.
// It may also have beside(args, index, count), which `count` idle threads of each block's feeding warpgroup
// run where has_beside(args): a pass over memory that the product hides.
#pragma once

#include <cuda.h>

#include "kernels/common.h"
#include "kernels/cuda_check.cuh"
#include "kernels/ptx_sm90.cuh"
#include "kernels/registers.h"
#include "kernels/tensor_map.cuh"

namespace pgolf::plain_product {

constexpr int kDepth = 64;  // slice of the depth: 128 bytes, the width of the swizzle
constexpr int kBoxBytes = 64 * kDepth * 2;
constexpr int kTileRows = 256;
constexpr int kTileColumns = 128;
constexpr int kCluster = 2;
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
static_assert(registers_fit(2, kConsumerRegisters, kProducerRegisters));
constexpr int kLeftBytes = 4 * kBoxBytes;
constexpr int kStageBytes = kLeftBytes + 2 * kBoxBytes;
constexpr int kStages = 4;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kStages * 8;
static_assert(kSharedBytes <= 232448, "shared memory of a block on sm_90");

struct Schedule {
  int rows, columns;
  int column_pairs;  // of tiles
  int tiles;         // of a cluster: 256 rows and two column tiles
  int slices;        // of the depth
};

struct Ring {
  uint32_t base, barriers;
  int stage = 0;
  uint32_t phase = 0;
  __device__ explicit Ring(uint32_t shared) {
    base = __shfl_sync(0xffffffffu, (shared + 1023u) & ~1023u, 0);
    barriers = base + kStages * kStageBytes;
  }
  __device__ uint32_t slot() const { return base + stage * kStageBytes; }
  __device__ uint32_t full(int at) const { return barriers + at * 8; }
  __device__ uint32_t empty(int at) const { return barriers + (kStages + at) * 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ int first_row(const Schedule& args, int tile) {
  return tile / args.column_pairs * kTileRows;
}

__device__ __forceinline__ int first_column(const Schedule& args, int tile, uint32_t rank) {
  return (tile % args.column_pairs * kCluster + static_cast<int>(rank)) * kTileColumns;
}

__device__ inline void produce(const Schedule& args, Ring ring, const CUtensorMap* left,
                               const CUtensorMap* right, uint32_t rank) {
  for (int tile = blockIdx.x / kCluster; tile < args.tiles; tile += gridDim.x / kCluster) {
    const int row = first_row(args, tile) + static_cast<int>(rank) * (kTileRows / 2);
    const int column = first_column(args, tile, rank);
    for (int slice = 0; slice < args.slices; ++slice) {
      // Free in both blocks: the multicast below writes half of the rows into the other's stage, too.
      mbarrier_wait_or_trap(ring.empty(ring.stage), ring.phase ^ 1);
      const uint32_t full = ring.full(ring.stage), slot = ring.slot();
      mbarrier_expect_bytes(full, kStageBytes);
      tma_load_2d_multicast(slot + rank * (kLeftBytes / 2), left, full, slice * kDepth, row, 3);
      // Columns are this block's own. A box is 64 columns wide, the width of the swizzle.
      tma_load_2d(slot + kLeftBytes, right, full, column, slice * kDepth);
      tma_load_2d(slot + kLeftBytes + kBoxBytes, right, full, column + 64, slice * kDepth);
      ring.advance();
    }
  }
}

// Where a thread's part of a tile lies, computed where it is asked for.
struct Place {
  int tile, group, warp, lane;
  uint32_t rank;

  // A thread holds rows r and r + 8 of each fragment of 64; see wgmma_64x128x16.
  __device__ __forceinline__ int row(const Schedule& args) const {
    return first_row(args, tile) + group * 128 + warp * 16 + lane / 4;
  }
  // Of the tile.
  __device__ __forceinline__ int column(const Schedule& args) const { return first_column(args, tile, rank); }
};

template <typename Epilogue>
__device__ void consume(const typename Epilogue::Args& own, Ring ring, uint32_t rank) {
  const Schedule& args = own.schedule;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroup - 1, 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  // All blocks walk the tiles in the same order, a grid apart: those at work at one time share rows in L2.
  for (int tile = blockIdx.x / kCluster; tile < args.tiles; tile += gridDim.x / kCluster) {
    const Place place{.tile = tile, .group = group, .warp = warp, .lane = lane, .rank = rank};
    Epilogue epilogue;
    epilogue.fetch(own, place);
    float sum[2][64];
    uint32_t previous = 0;
    for (int slice = 0; slice < args.slices; ++slice) {
      mbarrier_wait_or_trap(ring.full(ring.stage), ring.phase);
      const uint64_t a = wgmma_descriptor(ring.slot() + group * 2 * kBoxBytes);
      const uint64_t b = wgmma_descriptor(ring.slot() + kLeftBytes);
      wgmma_fence();
      PGOLF_UNROLL
      for (int k = 0; k < kDepth / 16; ++k) {
        PGOLF_UNROLL
        for (int i = 0; i < 2; ++i) {
          // The first product of a tile overwrites the sums, which saves setting them to zero.
          wgmma_64x128x16<true, false>(sum[i], wgmma_advance(a, k * 32 + i * kBoxBytes),
                                       wgmma_advance(b, k * 2048), slice > 0 || k > 0, __nv_bfloat16{});
        }
      }
      wgmma_commit();
      if (slice > 0) {
        // The slice before has been read; lanes 0 and 1 of each warp tell the producers of both blocks.
        wgmma_wait<1>();
        if (lane < kCluster) mbarrier_arrive_cluster(previous, lane);
      }
      previous = ring.empty(ring.stage);
      ring.advance();
    }
    wgmma_wait<0>();
    wgmma_keep_order(sum[0]);
    wgmma_keep_order(sum[1]);
    if (lane < kCluster) mbarrier_arrive_cluster(previous, lane);
    epilogue.finish(own, sum, place);
  }
}

template <typename Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right,
                   const __grid_constant__ typename Epilogue::Args args) {
  const Ring ring(shared_address(dynamic_shared()));
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    // Full: one arrival, which announces the bytes of all copies into the stage, also those of the other
    // block.
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(ring.full(stage), 1);
      mbarrier_init(ring.empty(stage), 8 * kCluster);  // the consuming warps of both blocks
    }
    mbarrier_init_fence();
    tma_prefetch(&left);
    tma_prefetch(&right);
  }
  // No block may copy into the other or arrive there before that one's barriers exist.
  cluster_sync();

  if (threadIdx.x < kGroup) {
    registers_lower<kProducerRegisters>();
    if (threadIdx.x == 0) produce(args.schedule, ring, &left, &right, rank);
    if constexpr (requires { Epilogue::beside(args, 0, 0); }) {
      if (threadIdx.x >= 32 && Epilogue::has_beside(args)) {
        Epilogue::beside(args, static_cast<int>(threadIdx.x) - 32, kGroup - 32);
      }
    }
    __syncwarp();
  } else {
    registers_raise<kConsumerRegisters>();
    consume<Epilogue>(args, ring, rank);
  }
  // Shared memory must outlive the copies and arrivals that come from the other block.
  cluster_sync();
}

// Launcher.
inline int64_t column_pairs(int64_t columns) {
  return (columns + kCluster * kTileColumns - 1) / (kCluster * kTileColumns);
}

inline int64_t cluster_tiles(int64_t rows, int64_t columns) {
  return (rows + kTileRows - 1) / kTileRows * column_pairs(columns);
}

struct Operands {
  const bf16* left;   // (rows, depth), rows left_ld elements apart, 16-byte aligned
  const bf16* right;  // (depth, columns) row-major, 16-byte aligned
  int64_t rows, columns, depth;
  int64_t left_ld;
};

// columns, left_ld: multiples of 8. Past the end of the depth the copy engine fills in zeros.
template <typename Epilogue>
void launch(const Operands& in, typename Epilogue::Args args, CUstream_st* stream) {
  args.schedule = {.rows = static_cast<int>(in.rows),
                   .columns = static_cast<int>(in.columns),
                   .column_pairs = static_cast<int>(column_pairs(in.columns)),
                   .tiles = static_cast<int>(cluster_tiles(in.rows, in.columns)),
                   .slices = static_cast<int>((in.depth + kDepth - 1) / kDepth)};
  const CUtensorMap left = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.left,
                                      matrix_map(in.rows, in.depth, in.left_ld, kTileRows / 2));
  const CUtensorMap right = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.right,
                                       matrix_map(in.depth, in.columns, in.columns, kDepth));
  launch_clusters(
      product_kernel<Epilogue>,
      {.clusters = args.schedule.tiles, .blocks = kCluster, .threads = kThreads, .shared = kSharedBytes},
      stream, left, right, args);
}

}  // namespace pgolf::plain_product
