// A persistent product of Hopper, a (rows x depth) times the transpose of b (columns x depth), with an
// epilogue of the caller's.
//
// Blocks come in clusters of two along the rows. A producer thread copies a row block of `a`, which stays in
// shared memory for all its tiles, and slices of `b` along the depth, through a ring; the two blocks work on
// the same columns and multicast half of each slice to each other. Consumers take turns: while one multiplies
// its 128 x 128 tile on the tensor cores, the other computes the epilogue of the tile before. What an
// epilogue reads from memory it fetches to registers before its turn, so that the product hides the way.
//
// A thread of lane 4 g + t holds columns 2 t, 2 t + 1 of every eight of its rows. The copy engine permutes
// the rows of `b` so that these are columns 8 t .. 8 t + 7 of every 32: 16 bytes of the output.
//
// The order of barriers and turns is that of linear_softcap_ce_sm90.cu.
#pragma once

#include <cuda.h>

#include "kernels/common.h"
#include "kernels/cuda_check.cuh"
#include "kernels/ptx_sm90.cuh"
#include "kernels/registers.h"
#include "kernels/tensor_map.cuh"

namespace pgolf::product {

constexpr int kTile = 128;  // rows and columns
constexpr int kCluster = 2;
constexpr int kTurns = 2;    // tiles in work: one multiplied, one in its epilogue
constexpr int kDepth = 64;   // slice of the depth: 128 bytes, the width of the swizzle
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kMaxSlices = 8;
constexpr int kStages = 6;
constexpr int kSliceBytes = kTile * kDepth * 2;
constexpr int kShare = kTile / kCluster;  // columns of a tile that one block of the cluster copies
constexpr int kFragments = 2;             // of 64 rows, of a warpgroup
constexpr int kThreads = (1 + kTurns) * kGroup;
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
static_assert(registers_fit(kTurns, kConsumerRegisters, kProducerRegisters));
constexpr int kBarriers = 2 * kStages + 2 * kMaxSlices;
constexpr int kSharedBytes = 1024 + (kMaxSlices + kStages) * kSliceBytes + kBarriers * 8;
static_assert(kSharedBytes <= 232448, "shared memory of a block on sm_90");

struct Schedule {
  int rows;
  int row_tiles;  // of kCluster row blocks each
  int column_tiles;
  int slices;  // of the depth
};

// A walk over the tiles of one cluster: a contiguous range of row-major order, so that rows are rarely
// reloaded.
struct Walk {
  int row, column;
  int left;

  // Tiles [all c / clusters, all (c + 1) / clusters) for cluster c: shares that differ by at most one tile.
  __device__ __forceinline__ explicit Walk(const Schedule& args) {
    const uint32_t cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
    const uint64_t all = static_cast<uint64_t>(args.row_tiles) * static_cast<uint64_t>(args.column_tiles);
    const auto first = static_cast<uint32_t>(all * cluster / clusters);
    left = static_cast<int>(static_cast<uint32_t>(all * (cluster + 1) / clusters) - first);
    row = static_cast<int>(first / args.column_tiles);
    column = static_cast<int>(first % args.column_tiles);
  }

  // Whether there are more than `tiles` tiles from this one on.
  __device__ __forceinline__ bool more_than(int tiles) const { return left > tiles; }

  __device__ __forceinline__ void advance(const Schedule& args, int steps) {
    left -= steps;
    column += steps;
    while (column >= args.column_tiles) {
      column -= args.column_tiles;
      ++row;
    }
  }
};

// Shared memory.
struct Shared {
  uint32_t resident, ring, barriers;
  // The compiler sees that a value from one lane is the same in all and keeps what follows from it in uniform
  // registers, where the addresses of wgmma's operands have to be.
  __device__ explicit Shared(uint32_t base) {
    resident = __shfl_sync(0xffffffffu, (base + 1023u) & ~1023u, 0);
    ring = resident + kMaxSlices * kSliceBytes;
    barriers = ring + kStages * kSliceBytes;
  }
  __device__ uint32_t columns(int stage) const { return ring + stage * kSliceBytes; }
  __device__ uint32_t rows(int slice) const { return resident + slice * kSliceBytes; }
  __device__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ uint32_t empty(int stage) const { return barriers + (kStages + stage) * 8; }
  __device__ uint32_t rows_full(int slice) const { return barriers + (2 * kStages + slice) * 8; }
  __device__ uint32_t rows_empty(int slice) const {
    return barriers + (2 * kStages + kMaxSlices + slice) * 8;
  }
};

// Stage and phase in one register.
struct RingPosition {
  uint32_t packed = 0;  // 2 stage + phase
  __device__ __forceinline__ int stage() const { return static_cast<int>(packed >> 1); }
  __device__ __forceinline__ uint32_t phase() const { return packed & 1; }
  __device__ __forceinline__ void advance() {
    packed += 2;
    if (packed >= 2 * kStages) packed = (packed & 1) ^ 1;
  }
  __device__ __forceinline__ void skip(int steps) {
    const uint32_t stages = (packed >> 1) + steps, laps = stages / kStages;
    packed = 2 * (stages - laps * kStages) + ((packed + laps) & 1);
  }
};

// Producer. Each block copies its share of a slice of `b` and sends it to the same place in both blocks, so
// that a slice crosses from L2 once per cluster.
__device__ __forceinline__ void load_columns(uint32_t to, const CUtensorMap* map, uint32_t full, int slice,
                                             int column, uint32_t rank) {
  constexpr uint16_t kAll = (1u << kCluster) - 1;
  to += rank * kShare * kDepth * 2;
  const int first = column + static_cast<int>(rank) * kShare;
  tma_load_5d_multicast(to, map, full, slice * kDepth, first / 32, kAll);
}

inline __device__ void produce(const Schedule& args, const Shared& shared, Walk tile, const CUtensorMap* left,
                               const CUtensorMap* right, uint32_t rank) {
  RingPosition at;
  int row_block = -1;
  uint32_t row_blocks = 0;  // loaded so far
  for (; tile.more_than(0); tile.advance(args, 1)) {
    const int first_row = (tile.row * kCluster + static_cast<int>(rank)) * kTile;
    // Resident rows are loaded once per row block; their barriers count row blocks instead of stages.
    const bool new_rows = tile.row != row_block;
    for (int slice = 0; slice < args.slices; ++slice) {
      if (new_rows) {
        if (row_blocks > 0) mbarrier_wait_or_trap(shared.rows_empty(slice), (row_blocks - 1) & 1);
        mbarrier_expect_bytes(shared.rows_full(slice), kSliceBytes);
        tma_load_2d(shared.rows(slice), left, shared.rows_full(slice), slice * kDepth, first_row);
      }
      // Free in both blocks of the cluster: this block's copy writes into the other's stage, too.
      mbarrier_wait_or_trap(shared.empty(at.stage()), at.phase() ^ 1);
      const uint32_t full = shared.full(at.stage());
      mbarrier_expect_bytes(full, kSliceBytes);
      load_columns(shared.columns(at.stage()), right, full, slice, tile.column * kTile, rank);
      at.advance();
    }
    if (new_rows) {
      row_block = tile.row;
      ++row_blocks;
    }
  }
}

// What a warpgroup has to know of a tile to multiply it.
struct Turn {
  int turn;             // 0 or 1: which of the tiles in work
  bool await_rows;      // the resident rows are new
  uint32_t rows_phase;  // of the barriers that say that they have arrived
  bool release_rows;    // no later tile of this turn needs the resident rows
  bool last_tile;       // no tile of the other turn follows
};

// A tile's product, once this group's turn has come.
__device__ __forceinline__ void multiply(const Schedule& args, const Shared& shared, RingPosition& at,
                                         float (&c)[kFragments][64], const Turn& turn) {
  const int lane = lane_index();
  uint32_t previous = 0;
  for (int slice = 0; slice < args.slices; ++slice) {
    if (turn.await_rows) mbarrier_wait_or_trap(shared.rows_full(slice), turn.rows_phase);
    mbarrier_wait_or_trap(shared.full(at.stage()), at.phase());
    // All of this group's copies have arrived: the other group's waits are at most one phase ahead.
    if (slice == args.slices - 1 && !turn.last_tile) named_arrive(2 - turn.turn, kTurns * kGroup);
    const uint64_t a = wgmma_descriptor<16>(shared.rows(slice));
    const uint64_t b = wgmma_descriptor<16>(shared.columns(at.stage()));
    wgmma_fence();
    PGOLF_UNROLL
    for (int k = 0; k < kDepth / 16; ++k) {
      PGOLF_UNROLL
      for (int f = 0; f < kFragments; ++f) {
        wgmma_64x128x16<true, true>(c[f], wgmma_advance(a, k * 32 + f * 64 * kDepth * 2),
                                    wgmma_advance(b, k * 32), slice > 0 || k > 0, __nv_bfloat16{});
      }
    }
    wgmma_commit();
    if (slice > 0) {
      // The slice before has been read: lane r of each warp tells block r, whose copies fill this stage.
      wgmma_wait<1>();
      if (lane < kCluster) mbarrier_arrive_cluster(previous, lane);
      if (turn.release_rows && lane == 0) mbarrier_arrive(shared.rows_empty(slice - 1));
    }
    previous = shared.empty(at.stage());
    at.advance();
  }
  wgmma_wait<0>();
  // Without this the compiler may move the epilogue's reads before the wait.
  PGOLF_UNROLL
  for (int f = 0; f < kFragments; ++f) wgmma_keep_order(c[f]);
  if (lane < kCluster) mbarrier_arrive_cluster(previous, lane);
  if (turn.release_rows && lane == 0) mbarrier_arrive(shared.rows_empty(args.slices - 1));
}

// Where a tile lies.
struct Place {
  int row;  // the first row of this thread; it has rows +0, +8, +64 and +72
  int column_tile;
  int block;  // of 128 rows
};

template <typename Epilogue>
__device__ void consume(const Schedule& args, const typename Epilogue::Args& own, const Shared& shared,
                        Walk tile, uint32_t rank) {
  // From lane 0, so that the compiler knows it to be the same in the warp and keeps it in uniform registers.
  const int turn = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroup - 1, 0);
  const int lane = threadIdx.x % 32;
  // This thread's first row within its row block.
  const int offset = threadIdx.x / 32 % 4 * 16 + lane / 4;
  RingPosition at;
  bool new_rows = true;
  uint32_t row_index = 0;  // of the row blocks of this block's walk
  bool wait_turn = false;  // for the other turn's tile
  if (turn == 1) {
    wait_turn = true;
    const int first = tile.row;
    const bool alone = !tile.more_than(1);
    tile.advance(args, 1);
    at.skip(args.slices);
    row_index = tile.row != first;
    // The first row block of the schedule is released by both turns even if one has no tile in it.
    if (!alone && tile.row != first && lane == 0) {
      for (int slice = 0; slice < args.slices; ++slice) mbarrier_arrive(shared.rows_empty(slice));
    }
  }
  for (; tile.more_than(0); tile.advance(args, kTurns)) {
    const int block = tile.row * kCluster + static_cast<int>(rank);
    const Place place{.row = block * kTile + offset, .column_tile = tile.column, .block = block};
    const bool release_rows = !tile.more_than(kTurns) || tile.column + kTurns >= args.column_tiles;

    Epilogue epilogue;
    epilogue.fetch(own, place);
    float c[kFragments][64];
    // Tiles take turns on the tensor cores.
    if (wait_turn) named_sync(1 + turn, kTurns * kGroup);
    multiply(args, shared, at, c,
             {.turn = turn,
              .await_rows = new_rows,
              .rows_phase = row_index & 1,
              .release_rows = release_rows,
              .last_tile = !tile.more_than(1)});
    wait_turn = true;
    // The other turn's tile comes next in the ring.
    at.skip(args.slices);

    epilogue.finish(own, c, place);
    new_rows = release_rows;
    row_index += release_rows;
  }
}

template <typename Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right,
                   const __grid_constant__ Schedule args,
                   const __grid_constant__ typename Epilogue::Args own) {
  const Shared shared(shared_address(dynamic_shared()));
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    // Full: one arrival, which announces the bytes of all copies into the stage, also those from the other
    // block.
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), 4 * kCluster);  // the warps of a tile in each block
    }
    for (int slice = 0; slice < kMaxSlices; ++slice) {
      mbarrier_init(shared.rows_full(slice), 1);
      mbarrier_init(shared.rows_empty(slice), 4 * kTurns);
    }
    mbarrier_init_fence();
    tma_prefetch(&left);
    tma_prefetch(&right);
  }
  // No block may copy into another or arrive there before that one's barriers exist.
  cluster_sync();
  __syncthreads();

  const Walk tiles(args);
  if (threadIdx.x < kGroup) {
    registers_lower<kProducerRegisters>();
    if (threadIdx.x == 0) produce(args, shared, tiles, &left, &right, rank);
    __syncwarp();
  } else {
    registers_raise<kConsumerRegisters>();
    consume<Epilogue>(args, own, shared, tiles, rank);
  }
  // Shared memory must outlive the copies and arrivals that come from the other block.
  cluster_sync();
}

// Launcher.
inline TensorShape matrix_map(int64_t rows, int64_t width, int box_rows) {
  return {.rank = 2,
          .sizes = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)},
          .strides = {static_cast<cuuint64_t>(width) * 2},
          .box = {kDepth, static_cast<cuuint32_t>(box_rows)}};
}

// Row 32 m + 8 t + 2 j + e of the matrix becomes row 32 m + 8 j + 2 t + e of the copy.
inline TensorShape permuted_map(int64_t rows, int64_t width, int box_rows) {
  const auto row_bytes = static_cast<cuuint64_t>(width) * 2;
  return {.rank = 5,
          .sizes = {static_cast<cuuint64_t>(width), 2, 4, 4, static_cast<cuuint64_t>(rows) / 32},
          .strides = {row_bytes, 8 * row_bytes, 2 * row_bytes, 32 * row_bytes},
          .box = {kDepth, 2, 4, 4, static_cast<cuuint32_t>(box_rows / 32)}};
}

struct Operands {
  const bf16* left;   // (rows, depth) row-major, 16-byte aligned
  const bf16* right;  // (columns, depth) row-major, 16-byte aligned
  int64_t rows, columns, depth;
};

// columns: a multiple of 128, at least 512. depth: a multiple of 8, at most 512.
template <typename Epilogue>
void launch(const Operands& in, const typename Epilogue::Args& own, CUstream_st* stream) {
  constexpr int64_t kClusterRows = kCluster * kTile;
  const Schedule args{.rows = static_cast<int>(in.rows),
                      .row_tiles = static_cast<int>((in.rows + kClusterRows - 1) / kClusterRows),
                      .column_tiles = static_cast<int>(in.columns / kTile),
                      .slices = static_cast<int>((in.depth + kDepth - 1) / kDepth)};
  const CUtensorMap left =
      tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.left, matrix_map(in.rows, in.depth, kTile));
  const CUtensorMap right =
      tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.right, permuted_map(in.columns, in.depth, kShare));
  const int64_t tiles = static_cast<int64_t>(args.row_tiles) * args.column_tiles;
  // One block per multiprocessor, as its shared memory allows no second one.
  const int64_t clusters = multiprocessor_count() / kCluster;

  auto kernel = product_kernel<Epilogue>;
  PGOLF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned int>((tiles < clusters ? tiles : clusters) * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  PGOLF_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, left, right, args, own));
}

}  // namespace pgolf::product
