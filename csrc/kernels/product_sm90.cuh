// A persistent product of Hopper, a (rows x depth) times the transpose of b (columns x depth), with an
// epilogue of the caller's.
//
// Blocks come in clusters of two along the rows. A producer thread copies slices of `a` and `b` along the
// depth through a ring; the two blocks work on the same columns and multicast half of each slice of `b` to
// each other. Where a row block of `a` fits shared memory, it stays there for all its tiles (kResident).
// Consumers take turns: while one multiplies its tile on the tensor cores, the other computes the epilogue of
// the tile before. What an epilogue reads from memory it fetches to registers before its turn, so that the
// product hides the way.
//
// A thread of lane 4 g + t holds columns 2 t, 2 t + 1 of every eight of its rows. Where their number is a
// multiple of 32 the copy engine can permute the rows of `b` so that these are columns 8 t .. 8 t + 7 of
// every 32: 16 bytes of the output (kPermuted).
//
// An epilogue is a class with a Form, its Args, fetch(args, place), called before a tile's product, and
// finish(args, accumulators, place), called after it. Each thread has one for all its tiles.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "kernels/common.h"
#include "kernels/cuda_check.cuh"
#include "kernels/ptx_sm90.cuh"
#include "kernels/registers.h"
#include "kernels/tensor_map.cuh"

namespace pgolf::product {

constexpr int kTile = 128;  // rows of a block's tile, and its columns where they are not wide
constexpr int kWideColumns = 192;
constexpr int kCluster = 2;
constexpr int kTurns = 2;    // tiles in work: one multiplied, one in its epilogue
constexpr int kDepth = 64;   // slice of the depth: 128 bytes, the width of the swizzle
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kProducerRegisters = 24;
constexpr int kSharedLimit = 232448;  // of a block on sm_90
constexpr int kMaxSlices = 8;         // of resident rows
constexpr int kSliceBytes = kTile * kDepth * 2;

// Of tiles and of their walk.
template <int Columns, int Parts, bool Resident, bool Permuted>
struct Form {
  // Warpgroups of a tile, which share its rows. One for wide tiles, whose accumulators fill its registers.
  static constexpr int kParts = Parts;
  static constexpr int kFragments = 2 / Parts;  // of 64 rows, of a warpgroup
  static constexpr int kThreads = (1 + kTurns * Parts) * kGroup;
  static constexpr int kConsumerRegisters = Parts == 2 ? 112 : 240;
  static constexpr int kColumns = Columns;
  static constexpr int kShare = Columns / kCluster;  // of them that one block of the cluster copies
  static constexpr bool kResident = Resident;
  static constexpr bool kPermuted = Permuted;
  // A few numbers are computed in two ways with the same result. The compiler orders a whole kernel's
  // instructions by them, so each kernel keeps the way that it was measured with: norm_mlp and qkv_rope this
  // one, linear_softcap_ce the other.
  static constexpr bool kAlone = Resident && Parts == 1;
  using AllTiles = std::conditional_t<kAlone, uint64_t, uint32_t>;  // their number
  using Count = std::conditional_t<kAlone, int, uint32_t>;          // of the walk
  static constexpr int kColumnBytes = Columns * kDepth * 2;
  static constexpr int kStageBytes = kColumnBytes + (Resident ? 0 : kSliceBytes);
  static constexpr int kResidentBytes = Resident ? kMaxSlices * kSliceBytes : 0;
  static constexpr int kStages = (kSharedLimit - 1024 - 512 - kResidentBytes) / kStageBytes;
  static constexpr int kBarriers = 2 * kStages + 2 * kMaxSlices;
  static constexpr int kSharedBytes = 1024 + kResidentBytes + kStages * kStageBytes + kBarriers * 8;
  static constexpr int kAccumulators = Columns / 2;  // of a thread, for 64 rows
  static_assert(kSharedBytes <= kSharedLimit && kStages >= 3, "shared memory");
  static_assert(registers_fit(kTurns* Parts, kConsumerRegisters, kProducerRegisters));
};

struct Schedule {
  int rows;
  int row_tiles;  // of kCluster row blocks each
  int column_tiles;
  int slices;  // of the depth
};

// Whether an epilogue's arguments have the schedule's members among them, which launch fills in.
template <typename Args>
concept Scheduled = requires(Args args) { args.rows + args.row_tiles + args.column_tiles + args.slices; };

// Rows of tiles that a schedule walks down before the next column.
constexpr uint32_t kBand = 8;

// A walk over the tiles of one cluster. Resident: a contiguous range of row-major order, so that rows are
// rarely reloaded. Otherwise every clusters()-th tile of an order that walks down kBand row tiles before the
// next column: the tiles of all clusters at one time share few rows and columns, which stay in L2.
template <typename F>
struct Walk {
  int row, column;
  typename F::Count at;  // resident: tiles left; else the index in that order

  __device__ __forceinline__ static uint32_t clusters() { return gridDim.x / kCluster; }
  template <typename Args>
  __device__ __forceinline__ static typename F::AllTiles all(const Args& args) {
    using All = typename F::AllTiles;
    return static_cast<All>(args.row_tiles) * static_cast<All>(args.column_tiles);
  }

  template <typename Args>
  __device__ __forceinline__ explicit Walk(const Args& args) {
    const uint32_t cluster = blockIdx.x / kCluster;
    if constexpr (F::kResident) {
      // Tiles [all c / clusters, all (c + 1) / clusters) for cluster c: shares that differ by at most one
      // tile.
      const uint32_t count = clusters();
      const uint64_t tiles = all(args);
      const auto first = static_cast<uint32_t>(tiles * cluster / count);
      at = static_cast<uint32_t>(tiles * (cluster + 1) / count - first);
      row = static_cast<int>(first / args.column_tiles);
      column = static_cast<int>(first % args.column_tiles);
    } else {
      at = cluster;
      locate(args);
    }
  }

  // Whether there are more than `tiles` tiles from this one on.
  template <typename Args>
  __device__ __forceinline__ bool more_than(const Args& args, uint32_t tiles) const {
    if constexpr (F::kResident) return static_cast<int>(at) > static_cast<int>(tiles);
    return at + tiles * clusters() < all(args);
  }

  // Whether no later tile of the same turn has the same rows.
  template <typename Args>
  __device__ __forceinline__ bool last_of_rows(const Args& args) const {
    return !more_than(args, kTurns) || column + kTurns >= args.column_tiles;
  }

  template <typename Args>
  __device__ __forceinline__ void advance(const Args& args, int steps) {
    if constexpr (F::kResident) {
      // A subtraction instead of a division: steps are 1 or 2.
      at -= steps;
      column += steps;
      while (column >= args.column_tiles) {
        column -= args.column_tiles;
        ++row;
      }
    } else {
      at += static_cast<uint32_t>(steps) * clusters();
      locate(args);
    }
  }

  template <typename Args>
  __device__ __forceinline__ void locate(const Args& args) {
    const uint32_t band_tiles = kBand * static_cast<uint32_t>(args.column_tiles);
    const uint32_t band = at / band_tiles, within = at - band * band_tiles;
    const uint32_t height = min(kBand, args.row_tiles - band * kBand);
    row = static_cast<int>(band * kBand + within % height);
    column = static_cast<int>(within / height);
  }
};

// Shared memory.
template <typename F>
struct Shared {
  uint32_t resident, ring, barriers;
  // The compiler sees that a value from one lane is the same in all and keeps what follows from it in uniform
  // registers, where the addresses of wgmma's operands have to be.
  __device__ explicit Shared(uint32_t base) {
    resident = __shfl_sync(0xffffffffu, (base + 1023u) & ~1023u, 0);
    ring = resident + F::kResidentBytes;
    barriers = ring + F::kStages * F::kStageBytes;
  }
  __device__ uint32_t columns(int stage) const { return ring + stage * F::kStageBytes; }
  __device__ uint32_t rows(int stage, int slice) const {
    return F::kResident ? resident + slice * kSliceBytes : columns(stage) + F::kColumnBytes;
  }
  __device__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ uint32_t empty(int stage) const { return barriers + (F::kStages + stage) * 8; }
  __device__ uint32_t rows_full(int slice) const { return barriers + (2 * F::kStages + slice) * 8; }
  __device__ uint32_t rows_empty(int slice) const {
    return barriers + (2 * F::kStages + kMaxSlices + slice) * 8;
  }
};

// Stage and phase in one register.
template <typename F>
struct RingPosition {
  uint32_t packed = 0;  // 2 stage + phase
  __device__ __forceinline__ int stage() const { return static_cast<int>(packed >> 1); }
  __device__ __forceinline__ uint32_t phase() const { return packed & 1; }
  __device__ __forceinline__ void advance() {
    packed += 2;
    if (packed >= 2 * F::kStages) packed = (packed & 1) ^ 1;
  }
  __device__ __forceinline__ void skip(int steps) {
    const uint32_t stages = (packed >> 1) + steps, laps = stages / F::kStages;
    packed = 2 * (stages - laps * F::kStages) + ((packed + laps) & 1);
  }
};

// Producer.
template <typename F>
__device__ void load_columns(uint32_t to, const CUtensorMap* map, uint32_t full, int slice, int column,
                             uint32_t rank) {
  constexpr uint16_t kAll = (1u << kCluster) - 1;
  // Each block loads its share of the columns and sends it to the same place in all blocks of the cluster, so
  // a slice of `b` crosses from L2 once per cluster.
  to += rank * F::kShare * kDepth * 2;
  const int first = column + static_cast<int>(rank) * F::kShare;
  if constexpr (F::kPermuted) {
    tma_load_5d_multicast(to, map, full, slice * kDepth, first / 32, kAll);
  } else {
    tma_load_2d_multicast(to, map, full, slice * kDepth, first, kAll);
  }
}

template <typename F, typename Args>
__device__ void produce(const Args& args, const Shared<F>& shared, Walk<F> tile, const CUtensorMap* left,
                        const CUtensorMap* right, uint32_t rank) {
  RingPosition<F> at;
  int row_block = -1;
  uint32_t row_blocks = 0;  // loaded so far
  for (; tile.more_than(args, 0); tile.advance(args, 1)) {
    const int first_row = (tile.row * kCluster + static_cast<int>(rank)) * kTile;
    // Resident rows are loaded once per row block; their barriers count row blocks instead of stages.
    const bool new_rows = tile.row != row_block;
    for (int slice = 0; slice < args.slices; ++slice) {
      if (F::kResident && new_rows) {
        if (row_blocks > 0) mbarrier_wait_or_trap(shared.rows_empty(slice), (row_blocks - 1) & 1);
        mbarrier_expect_bytes(shared.rows_full(slice), kSliceBytes);
        tma_load_2d(shared.rows(0, slice), left, shared.rows_full(slice), slice * kDepth, first_row);
      }
      // Free in all blocks of the cluster: this block's copy writes into the others' stage, too.
      mbarrier_wait_or_trap(shared.empty(at.stage()), at.phase() ^ 1);
      const uint32_t full = shared.full(at.stage());
      mbarrier_expect_bytes(full, F::kStageBytes);
      if constexpr (!F::kResident) {
        tma_load_2d(shared.rows(at.stage(), slice), left, full, slice * kDepth, first_row);
      }
      load_columns<F>(shared.columns(at.stage()), right, full, slice, tile.column * F::kColumns, rank);
      at.advance();
    }
    if (new_rows) {
      row_block = tile.row;
      ++row_blocks;
    }
  }
}

// One instruction's product.
template <typename F>
__device__ __forceinline__ void multiply_add(float (&c)[F::kAccumulators], uint64_t a, uint64_t b,
                                             int accumulate) {
  if constexpr (F::kColumns == 128) {
    wgmma_64x128x16<true, true>(c, a, b, accumulate, __nv_bfloat16{});
  } else {
    wgmma_64x192x16(c, a, b, accumulate);
  }
}

// What a warpgroup has to know of a tile to multiply it.
struct Turn {
  int turn;             // 0 or 1: which of the tiles in work
  int part;             // of the tile's rows, where two warpgroups share them
  bool await_rows;      // the resident rows are new
  uint32_t rows_phase;  // of the barriers that say that they have arrived
  bool release_rows;    // no later tile of this turn needs the resident rows
  bool last_tile;       // no tile of the other turn follows
};

// A tile's product, once this group's turn has come.
template <typename F, typename Args>
__device__ __forceinline__ void multiply(const Args& args, const Shared<F>& shared, RingPosition<F>& at,
                                         float (&c)[F::kFragments][F::kAccumulators], const Turn& turn) {
  const int lane = lane_index();
  uint32_t previous = 0;
  for (int slice = 0; slice < args.slices; ++slice) {
    if (F::kResident && turn.await_rows) mbarrier_wait_or_trap(shared.rows_full(slice), turn.rows_phase);
    mbarrier_wait_or_trap(shared.full(at.stage()), at.phase());
    // All of this group's copies have arrived: the other group's waits are at most one phase ahead.
    if (slice == args.slices - 1 && !turn.last_tile) named_arrive(2 - turn.turn, kTurns * F::kParts * kGroup);
    const uint64_t a = wgmma_descriptor<16>(shared.rows(at.stage(), slice) + turn.part * 64 * kDepth * 2);
    const uint64_t b = wgmma_descriptor<16>(shared.columns(at.stage()));
    wgmma_fence();
    PGOLF_UNROLL
    for (int k = 0; k < kDepth / 16; ++k) {
      PGOLF_UNROLL
      for (int f = 0; f < F::kFragments; ++f) {
        multiply_add<F>(c[f], wgmma_advance(a, k * 32 + f * 64 * kDepth * 2), wgmma_advance(b, k * 32),
                        slice > 0 || k > 0);
      }
    }
    wgmma_commit();
    if (slice > 0) {
      // The slice before has been read: lane r of each warp tells block r, whose copies fill this stage.
      wgmma_wait<1>();
      if (lane < kCluster) mbarrier_arrive_cluster(previous, lane);
      if (F::kResident && turn.release_rows && lane == 0) mbarrier_arrive(shared.rows_empty(slice - 1));
    }
    previous = shared.empty(at.stage());
    at.advance();
  }
  wgmma_wait<0>();
  // Without this the compiler may move the epilogue's reads before the wait.
  PGOLF_UNROLL
  for (int f = 0; f < F::kFragments; ++f) wgmma_keep_order(c[f]);
  if (lane < kCluster) mbarrier_arrive_cluster(previous, lane);
  if (F::kResident && turn.release_rows && lane == 0) mbarrier_arrive(shared.rows_empty(args.slices - 1));
}

// Where a tile lies.
struct Place {
  int row;  // the first row of this thread; it has rows +0 and +8 of each fragment of 64
  int column_tile;
  int block;             // of 128 rows
  bool new_rows = true;  // other rows than those of this thread's tile before
};

template <typename Epilogue, typename F, typename Args>
__device__ void consume(const Args& args, const typename Epilogue::Args& own, const Shared<F>& shared,
                        Walk<F> tile, uint32_t rank) {
  // From lane 0, so that the compiler knows it to be the same in the warp and keeps it in uniform registers.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroup - 1, 0);
  const int turn = group / F::kParts, part = group % F::kParts;
  const int lane = threadIdx.x % 32;
  // This thread's first row within its row block, or within those of the cluster.
  const int offset =
      (F::kAlone ? 0 : static_cast<int>(rank) * kTile) + part * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
  RingPosition<F> at;
  bool new_rows = true;
  uint32_t row_index = 0;  // of the row blocks of this block's walk, or its last bit
  bool wait_turn = false;  // for the other turn's tile
  if (turn == 1) {
    wait_turn = true;
    const int first = tile.row;
    const bool alone = !tile.more_than(args, 1);
    tile.advance(args, 1);
    at.skip(args.slices);
    row_index = tile.row != first;
    // The first row block of the schedule is released by both turns even if one has no tile in it.
    if (F::kResident && !alone && tile.row != first && lane == 0) {
      for (int slice = 0; slice < args.slices; ++slice) mbarrier_arrive(shared.rows_empty(slice));
    }
  }
  Epilogue epilogue;  // keeps what it knows of its rows from tile to tile
  for (; tile.more_than(args, 0); tile.advance(args, kTurns)) {
    const int block = tile.row * kCluster + static_cast<int>(rank);
    const Place place{.row = F::kAlone ? block * kTile + offset : tile.row * (kCluster * kTile) + offset,
                      .column_tile = tile.column,
                      .block = block,
                      .new_rows = new_rows || !F::kResident};
    bool release_rows;
    if constexpr (F::kAlone) release_rows = tile.last_of_rows(args);
    epilogue.fetch(own, place);
    if constexpr (!F::kAlone) release_rows = F::kResident && tile.last_of_rows(args);

    float c[F::kFragments][F::kAccumulators];
    // Tiles take turns on the tensor cores.
    if (wait_turn) named_sync(1 + turn, kTurns * F::kParts * kGroup);
    multiply<F>(args, shared, at, c,
                {.turn = turn,
                 .part = part,
                 .await_rows = new_rows,
                 .rows_phase = F::kAlone ? row_index & 1 : row_index,
                 .release_rows = release_rows,
                 .last_tile = !tile.more_than(args, 1)});
    wait_turn = true;
    // The other turn's tile comes next in the ring.
    at.skip(args.slices);

    epilogue.finish(own, c, place);
    new_rows = release_rows;
    if constexpr (F::kAlone) {
      row_index += release_rows;
    } else {
      row_index ^= release_rows;
    }
  }
}

template <typename Epilogue, typename Args>
__device__ __forceinline__ void run(const Args& args, const typename Epilogue::Args& own,
                                    const CUtensorMap* left, const CUtensorMap* right) {
  using F = typename Epilogue::Form;
  const Shared<F> shared(shared_address(dynamic_shared()));
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    // Full: one arrival, which announces the bytes of all copies into the stage, also those from the other
    // block.
    for (int stage = 0; stage < F::kStages; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), 4 * F::kParts * kCluster);  // the warps of a tile in each block
    }
    for (int slice = 0; slice < kMaxSlices; ++slice) {
      mbarrier_init(shared.rows_full(slice), 1);
      mbarrier_init(shared.rows_empty(slice), 4 * kTurns * F::kParts);
    }
    mbarrier_init_fence();
    tma_prefetch(left);
    tma_prefetch(right);
  }
  // No block may copy into another or arrive there before that one's barriers exist.
  cluster_sync();
  __syncthreads();

  const Walk<F> tiles(args);
  if (threadIdx.x < kGroup) {
    registers_lower<kProducerRegisters>();
    if (threadIdx.x == 0) produce<F>(args, shared, tiles, left, right, rank);
    __syncwarp();
  } else {
    registers_raise<F::kConsumerRegisters>();
    consume<Epilogue>(args, own, shared, tiles, rank);
  }
  // Shared memory must outlive the copies and arrivals that come from the other block.
  cluster_sync();
}

template <typename Epilogue>
__global__ void __launch_bounds__(Epilogue::Form::kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right,
                   const __grid_constant__ Schedule args,
                   const __grid_constant__ typename Epilogue::Args own) {
  run<Epilogue>(args, own, &left, &right);
}

template <typename Epilogue>
  requires Scheduled<typename Epilogue::Args>
__global__ void __launch_bounds__(Epilogue::Form::kThreads, 1)
    scheduled_kernel(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right,
                     const __grid_constant__ typename Epilogue::Args args) {
  run<Epilogue>(args, args, &left, &right);
}

// Launcher. Row 32 m + 8 t + 2 j + e of the matrix becomes row 32 m + 8 j + 2 t + e of the copy.
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

// columns: a multiple of 32 where the form permutes them. depth: a multiple of 8. With resident rows also
// columns of at least four tiles and a depth of at most 512.
template <typename Epilogue>
void launch(const Operands& in, const typename Epilogue::Args& own, CUstream_st* stream) {
  using F = typename Epilogue::Form;
  constexpr int64_t kClusterRows = kCluster * kTile;
  const Schedule args{.rows = static_cast<int>(in.rows),
                      .row_tiles = static_cast<int>((in.rows + kClusterRows - 1) / kClusterRows),
                      .column_tiles = static_cast<int>((in.columns + F::kColumns - 1) / F::kColumns),
                      .slices = static_cast<int>((in.depth + kDepth - 1) / kDepth)};
  const CUtensorMap left =
      tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.left, matrix_map(in.rows, in.depth, in.depth, kTile));
  const CUtensorMap right = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.right,
                                       F::kPermuted ? permuted_map(in.columns, in.depth, F::kShare)
                                                    : matrix_map(in.columns, in.depth, in.depth, F::kShare));
  const int64_t tiles = static_cast<int64_t>(args.row_tiles) * args.column_tiles;
  const ClusterGrid grid{
      .clusters = tiles, .blocks = kCluster, .threads = F::kThreads, .shared = F::kSharedBytes};
  if constexpr (Scheduled<typename Epilogue::Args>) {
    auto all = own;
    all.rows = args.rows;
    all.row_tiles = args.row_tiles;
    all.column_tiles = args.column_tiles;
    all.slices = args.slices;
    launch_clusters(scheduled_kernel<Epilogue>, grid, stream, left, right, all);
  } else {
    launch_clusters(product_kernel<Epilogue>, grid, stream, left, right, args, own);
  }
}

}  // namespace pgolf::product
