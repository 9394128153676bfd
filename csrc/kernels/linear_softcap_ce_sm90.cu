// Hopper kernel of linear_softcap_ce.h: x = hidden weight^T on wgmma, the soft-capped exponential in the
// epilogue.
//
// Persistent blocks, in clusters along the rows, of one producer thread (bulk tensor copies into a ring of
// k slices) and two turns of consumer warpgroups, each of which owns every second tile: while one runs its
// product on the tensor cores, the other computes its epilogue. The blocks of a cluster work on neighbouring
// row blocks and the same columns, and multicast their share of the weight to each other.
//
// Where a row block of `hidden` fits shared memory, it stays there for all its tiles (kResident). The
// epilogue then takes longer than the product, and two warpgroups share a tile. For large widths tiles are
// 128 x 192. They read less per product, which at the power limit leaves a higher clock rate
// (docs/findings.md, 2026-11-24), and their accumulators fill a warpgroup's registers.
#include <cuda.h>

#include "kernels/cuda_check.cuh"
#include "kernels/linear_softcap_ce.h"
#include "kernels/linear_softcap_ce_epilogue.cuh"
#include "kernels/ptx_sm90.cuh"
#include "kernels/registers.h"
#include "kernels/tensor_map.cuh"

namespace pgolf {
namespace {

constexpr int kTileRows = 128;
constexpr int kTileColumns = 128;
constexpr int kWideColumns = 192;
constexpr int kCluster = 2;
constexpr int kTurns = 2;    // tiles in work: one multiplied, one in its epilogue
constexpr int kDepth = 64;   // slice of k: 128 bytes, the width of the swizzle
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kProducerRegisters = 24;
constexpr int kSharedLimit = 232448;  // of a block on sm_90
constexpr int kMaxSlices = 8;         // of a resident row block
constexpr int kSliceBytes = kTileRows * kDepth * 2;
constexpr float kMinCap = 1e-6f;
constexpr float kMaxCap = 40.0f;  // exp(-80) = 1.8e-35

template <int TileColumns, int Parts, bool Resident, bool Permuted, bool Factor>
struct Config {
  // Warpgroups of a tile, which share its rows. One for wide tiles, whose accumulators fill its registers.
  static constexpr int kParts = Parts;
  static constexpr int kFragments = 2 / Parts;  // of 64 rows
  static constexpr int kThreads = (1 + kTurns * Parts) * kGroup;
  static constexpr int kConsumerRegisters = Parts == 2 ? 112 : 240;
  static constexpr int kColumns = TileColumns;
  static constexpr bool kResident = Resident;
  // The thread of lane 4 g + t holds columns 2 t, 2 t + 1 of every eight. Where vocab is a multiple of 32 the
  // copy engine permutes the weight's rows so that these are columns 8 t .. 8 t + 7 of every 32: 16 bytes of
  // F.
  static constexpr bool kPermuted = Permuted;
  static constexpr bool kFactor = Factor;
  static constexpr int kColumnBytes = TileColumns * kDepth * 2;
  static constexpr int kStageBytes = kColumnBytes + (Resident ? 0 : kSliceBytes);
  static constexpr int kResidentBytes = Resident ? kMaxSlices * kSliceBytes : 0;
  static constexpr int kStages = (kSharedLimit - 1024 - 512 - kResidentBytes) / kStageBytes;
  static constexpr int kBarriers = 2 * kStages + 2 * kMaxSlices;
  static constexpr int kSharedBytes = 1024 + kResidentBytes + kStages * kStageBytes + kBarriers * 8;
  static constexpr int kAccumulators = TileColumns / 2;  // of a thread, for 64 rows
  static_assert(kSharedBytes <= kSharedLimit && kStages >= 3, "shared memory");
  static_assert(registers_fit(kTurns* Parts, kConsumerRegisters, kProducerRegisters));
};

struct KernelArgs : epilogue::Args {
  const int64_t* target;
  int64_t ignore_index;
  int row_tiles;  // of kCluster row blocks each
  int slices;     // of k
};

// Rows of tiles that a schedule walks down before the next column.
constexpr uint32_t kBand = 8;

// A walk over the tiles of one cluster. Resident: a contiguous range of row-major order, so that `hidden` is
// rarely reloaded. Otherwise every clusters()-th tile of an order that walks down kBand row tiles before the
// next column: the tiles of all clusters at one time share few rows and columns, which stay in L2.
template <typename C>
struct Walk {
  int row, column;
  uint32_t at;  // resident: tiles left; else the index in that order

  __device__ __forceinline__ static uint32_t clusters() { return gridDim.x / kCluster; }
  __device__ __forceinline__ static uint32_t all(const KernelArgs& args) {
    return static_cast<uint32_t>(args.row_tiles) * static_cast<uint32_t>(args.column_tiles);
  }

  __device__ __forceinline__ explicit Walk(const KernelArgs& args) {
    const uint32_t cluster = blockIdx.x / kCluster;
    if constexpr (C::kResident) {
      // Tiles [all c / clusters, all (c + 1) / clusters) for cluster c: shares that differ by at most one
      // tile.
      const auto first = static_cast<uint32_t>(static_cast<uint64_t>(all(args)) * cluster / clusters());
      at = static_cast<uint32_t>(static_cast<uint64_t>(all(args)) * (cluster + 1) / clusters() - first);
      row = static_cast<int>(first / args.column_tiles);
      column = static_cast<int>(first % args.column_tiles);
    } else {
      at = cluster;
      locate(args);
    }
  }

  // Whether there are more than `tiles` tiles from this one on.
  __device__ __forceinline__ bool more_than(const KernelArgs& args, uint32_t tiles) const {
    if constexpr (C::kResident) return static_cast<int>(at) > static_cast<int>(tiles);
    return at + tiles * clusters() < all(args);
  }

  __device__ __forceinline__ void advance(const KernelArgs& args, int steps) {
    if constexpr (C::kResident) {
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

  __device__ __forceinline__ void locate(const KernelArgs& args) {
    const uint32_t band_tiles = kBand * static_cast<uint32_t>(args.column_tiles);
    const uint32_t band = at / band_tiles, within = at - band * band_tiles;
    const uint32_t height = min(kBand, args.row_tiles - band * kBand);
    row = static_cast<int>(band * kBand + within % height);
    column = static_cast<int>(within / height);
  }
};

// Shared memory.
template <typename C>
struct Shared {
  uint32_t resident, ring, barriers;
  // The compiler sees that a value from one lane is the same in all and keeps what follows from it in uniform
  // registers, where the addresses of wgmma's operands have to be.
  __device__ explicit Shared(uint32_t base) {
    resident = __shfl_sync(0xffffffffu, (base + 1023u) & ~1023u, 0);
    ring = resident + C::kResidentBytes;
    barriers = ring + C::kStages * C::kStageBytes;
  }
  __device__ uint32_t columns(int stage) const { return ring + stage * C::kStageBytes; }
  __device__ uint32_t rows(int stage, int slice) const {
    return C::kResident ? resident + slice * kSliceBytes : columns(stage) + C::kColumnBytes;
  }
  __device__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ uint32_t empty(int stage) const { return barriers + (C::kStages + stage) * 8; }
  __device__ uint32_t rows_full(int slice) const { return barriers + (2 * C::kStages + slice) * 8; }
  __device__ uint32_t rows_empty(int slice) const {
    return barriers + (2 * C::kStages + kMaxSlices + slice) * 8;
  }
};

// Stage and phase in one register.
template <typename C>
struct RingPosition {
  uint32_t packed = 0;  // 2 stage + phase
  __device__ __forceinline__ int stage() const { return static_cast<int>(packed >> 1); }
  __device__ __forceinline__ uint32_t phase() const { return packed & 1; }
  __device__ __forceinline__ void advance() {
    packed += 2;
    if (packed >= 2 * C::kStages) packed = (packed & 1) ^ 1;
  }
  __device__ __forceinline__ void skip(int steps) {
    const uint32_t stages = (packed >> 1) + steps, laps = stages / C::kStages;
    packed = 2 * (stages - laps * C::kStages) + ((packed + laps) & 1);
  }
};

// Producer.
template <typename C>
__device__ void load_columns(uint32_t to, const CUtensorMap* map, uint32_t full, int slice, int column,
                             uint32_t rank) {
  constexpr int kShare = C::kColumns / kCluster;
  constexpr uint16_t kAll = (1u << kCluster) - 1;
  // Each block loads its share of the columns and sends it to the same place in all blocks of the cluster, so
  // a slice of the weight crosses from L2 once per cluster.
  to += rank * kShare * kDepth * 2;
  const int first = column + static_cast<int>(rank) * kShare;
  if constexpr (C::kPermuted) {
    tma_load_5d_multicast(to, map, full, slice * kDepth, first / 32, kAll);
  } else {
    tma_load_2d_multicast(to, map, full, slice * kDepth, first, kAll);
  }
}

template <typename C>
__device__ void produce(const KernelArgs& args, const Shared<C>& shared, Walk<C> tile,
                        const CUtensorMap* hidden, const CUtensorMap* weight, uint32_t rank) {
  RingPosition<C> at;
  int row_block = -1;
  uint32_t row_blocks = 0;  // loaded so far
  for (; tile.more_than(args, 0); tile.advance(args, 1)) {
    const int first_row = (tile.row * kCluster + static_cast<int>(rank)) * kTileRows;
    // Resident rows are loaded once per row block; their barriers count row blocks instead of stages.
    const bool new_rows = tile.row != row_block;
    for (int slice = 0; slice < args.slices; ++slice) {
      if (C::kResident && new_rows) {
        if (row_blocks > 0) mbarrier_wait_or_trap(shared.rows_empty(slice), (row_blocks - 1) & 1);
        mbarrier_expect_bytes(shared.rows_full(slice), kSliceBytes);
        tma_load_2d(shared.rows(0, slice), hidden, shared.rows_full(slice), slice * kDepth, first_row);
      }
      // Free in all blocks of the cluster: this block's copy writes into the others' stage, too.
      mbarrier_wait_or_trap(shared.empty(at.stage()), at.phase() ^ 1);
      const uint32_t full = shared.full(at.stage());
      mbarrier_expect_bytes(full, C::kStageBytes);
      if constexpr (!C::kResident) {
        tma_load_2d(shared.rows(at.stage(), slice), hidden, full, slice * kDepth, first_row);
      }
      load_columns<C>(shared.columns(at.stage()), weight, full, slice, tile.column * C::kColumns, rank);
      at.advance();
    }
    if (new_rows) {
      row_block = tile.row;
      ++row_blocks;
    }
  }
}

// The target's column, or one of epilogue's kInvalidTarget and kIgnoredTarget, whose logits are written here.
__device__ __forceinline__ int load_target(const KernelArgs& args, int row) {
  if (row >= args.rows) return epilogue::kIgnoredTarget;
  const int64_t label = args.target[row];
  if (label != args.ignore_index && label >= 0 && label < args.vocab) return static_cast<int>(label);
  const bool ignored = label == args.ignore_index;
  args.target_logit[row] = ignored ? 0.0f : __int_as_float(0x7fffffff);
  return ignored ? epilogue::kIgnoredTarget : epilogue::kInvalidTarget;
}

// One of the two rows that this thread holds of 64.
template <typename C, int Half>
__device__ __forceinline__ void finish_row(const KernelArgs& args, const float (&c)[C::kAccumulators],
                                           uint32_t own, int row, int column_tile) {
  float value[C::kColumns / 4];
  PGOLF_UNROLL
  for (int i = 0; i < C::kColumns / 4; ++i) value[i] = c[i / 2 * 4 + Half * 2 + i % 2];
  epilogue::Row<C>{
      .args = args, .value = value, .row = row, .column_tile = column_tile, .t = lane_index() % 4}
      .run(own & 255u);
}

template <typename C>
__device__ __forceinline__ void finish_tile(const KernelArgs& args,
                                            const float (&c)[C::kFragments][C::kAccumulators], uint32_t own,
                                            int row, int column_tile) {
  PGOLF_UNROLL
  for (int f = 0; f < C::kFragments; ++f) {
    finish_row<C, 0>(args, c[f], own >> 16 * f, row + 64 * f, column_tile);
    finish_row<C, 1>(args, c[f], own >> (16 * f + 8), row + 64 * f + 8, column_tile);
  }
}

// One instruction's product.
template <typename C>
__device__ __forceinline__ void multiply_add(float (&c)[C::kAccumulators], uint64_t a, uint64_t b,
                                             int accumulate) {
  if constexpr (C::kColumns == 128) {
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
template <typename C>
__device__ __forceinline__ void multiply(const KernelArgs& args, const Shared<C>& shared, RingPosition<C>& at,
                                         float (&c)[C::kFragments][C::kAccumulators], const Turn& turn) {
  const int lane = lane_index();
  uint32_t previous = 0;
  for (int slice = 0; slice < args.slices; ++slice) {
    if (C::kResident && turn.await_rows) mbarrier_wait_or_trap(shared.rows_full(slice), turn.rows_phase);
    mbarrier_wait_or_trap(shared.full(at.stage()), at.phase());
    // All of this group's copies have arrived: the other group's waits are at most one phase ahead.
    if (slice == args.slices - 1 && !turn.last_tile) named_arrive(2 - turn.turn, kTurns * C::kParts * kGroup);
    const uint64_t a = wgmma_descriptor<16>(shared.rows(at.stage(), slice) + turn.part * 64 * kDepth * 2);
    const uint64_t b = wgmma_descriptor<16>(shared.columns(at.stage()));
    wgmma_fence();
    PGOLF_UNROLL
    for (int k = 0; k < kDepth / 16; ++k) {
      PGOLF_UNROLL
      for (int f = 0; f < C::kFragments; ++f) {
        multiply_add<C>(c[f], wgmma_advance(a, k * 32 + f * 64 * kDepth * 2), wgmma_advance(b, k * 32),
                        slice > 0 || k > 0);
      }
    }
    wgmma_commit();
    if (slice > 0) {
      // The slice before has been read: lane r of each warp tells block r, whose copies fill this stage.
      wgmma_wait<1>();
      if (lane < kCluster) mbarrier_arrive_cluster(previous, lane);
      if (C::kResident && turn.release_rows && lane == 0) mbarrier_arrive(shared.rows_empty(slice - 1));
    }
    previous = shared.empty(at.stage());
    at.advance();
  }
  wgmma_wait<0>();
  // Without this the compiler may move the epilogue's reads before the wait.
  PGOLF_UNROLL
  for (int f = 0; f < C::kFragments; ++f) wgmma_keep_order(c[f]);
  if (lane < kCluster) mbarrier_arrive_cluster(previous, lane);
  if (C::kResident && turn.release_rows && lane == 0) mbarrier_arrive(shared.rows_empty(args.slices - 1));
}

template <typename C>
__device__ void consume(const KernelArgs& args, const Shared<C>& shared, Walk<C> tile, uint32_t rank) {
  // From lane 0, so that the compiler knows it to be the same in the warp and keeps it in uniform registers.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroup - 1, 0);
  const int turn = group / C::kParts, part = group % C::kParts;
  const int lane = threadIdx.x % 32;
  // This thread's first row within the rows of a cluster's tile.
  const int offset = static_cast<int>(rank) * kTileRows + part * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
  RingPosition<C> at;
  bool new_rows = true;
  uint32_t rows_phase = 0;
  bool wait = false;  // for the other turn's tile
  if (turn == 1) {
    wait = true;
    const int first = tile.row;
    const bool alone = !tile.more_than(args, 1);
    tile.advance(args, 1);
    at.skip(args.slices);
    rows_phase = tile.row != first;
    // The first row block of the schedule is released by both turns even if one has no tile in it.
    if (C::kResident && !alone && tile.row != first && lane == 0) {
      for (int slice = 0; slice < args.slices; ++slice) mbarrier_arrive(shared.rows_empty(slice));
    }
  }
  int target[2 * C::kFragments];  // of rows +0, +8, +64, +72
  for (; tile.more_than(args, 0); tile.advance(args, kTurns)) {
    const int row = tile.row * (kCluster * kTileRows) + offset;
    if (new_rows || !C::kResident) {
      PGOLF_UNROLL
      for (int r = 0; r < 2 * C::kFragments; ++r) target[r] = load_target(args, row + r / 2 * 64 + r % 2 * 8);
    }
    uint32_t own = 0;  // one byte per row
    PGOLF_UNROLL
    for (int r = 0; r < 2 * C::kFragments; ++r) {
      own |= epilogue::Row<C>::own_column(target[r], tile.column) << 8 * r;
    }
    const bool release_rows =
        C::kResident && (!tile.more_than(args, kTurns) || tile.column + kTurns >= args.column_tiles);

    float c[C::kFragments][C::kAccumulators];
    // Tiles take turns on the tensor cores.
    if (wait) named_sync(1 + turn, kTurns * C::kParts * kGroup);
    multiply<C>(args, shared, at, c,
                {.turn = turn,
                 .part = part,
                 .await_rows = new_rows,
                 .rows_phase = rows_phase,
                 .release_rows = release_rows,
                 .last_tile = !tile.more_than(args, 1)});
    wait = true;
    // The other turn's tile comes next in the ring.
    at.skip(args.slices);

    finish_tile<C>(args, c, own, row, tile.column);
    new_rows = release_rows;
    rows_phase ^= release_rows;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap hidden, const __grid_constant__ CUtensorMap weight,
                   const __grid_constant__ KernelArgs args) {
  const Shared<C> shared(shared_address(dynamic_shared()));
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    // Full: one arrival, which announces the bytes of all copies into the stage, also those from other
    // blocks.
    for (int stage = 0; stage < C::kStages; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), 4 * C::kParts * kCluster);  // the warps of a tile in each block
    }
    for (int slice = 0; slice < kMaxSlices; ++slice) {
      mbarrier_init(shared.rows_full(slice), 1);
      mbarrier_init(shared.rows_empty(slice), 4 * kTurns * C::kParts);
    }
    mbarrier_init_fence();
    tma_prefetch(&hidden);
    tma_prefetch(&weight);
  }
  // No block may copy into another or arrive there before that one's barriers exist.
  cluster_sync();
  __syncthreads();

  const Walk<C> tiles(args);
  if (threadIdx.x < kGroup) {
    registers_lower<kProducerRegisters>();
    if (threadIdx.x == 0) produce<C>(args, shared, tiles, &hidden, &weight, rank);
    __syncwarp();
  } else {
    registers_raise<C::kConsumerRegisters>();
    consume<C>(args, shared, tiles, rank);
  }
  // Shared memory must outlive the copies and arrivals that come from the other blocks.
  cluster_sync();
}

// Launcher.
TensorShape plain_map(int64_t rows, int64_t width, int box_rows) {
  const auto row_bytes = static_cast<cuuint64_t>(width) * 2;
  return {.rank = 2,
          .sizes = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)},
          .strides = {row_bytes},
          .box = {kDepth, static_cast<cuuint32_t>(box_rows)}};
}

// Row 32 m + 8 t + 2 j + e of the matrix becomes row 32 m + 8 j + 2 t + e of the copy.
TensorShape permuted_map(int64_t rows, int64_t width, int box_rows) {
  const auto row_bytes = static_cast<cuuint64_t>(width) * 2;
  return {.rank = 5,
          .sizes = {static_cast<cuuint64_t>(width), 2, 4, 4, static_cast<cuuint64_t>(rows) / 32},
          .strides = {row_bytes, 8 * row_bytes, 2 * row_bytes, 32 * row_bytes},
          .box = {kDepth, 2, 4, 4, static_cast<cuuint32_t>(box_rows / 32)}};
}

template <typename C>
void launch(const LinearSoftcapCeForward& in, const LinearSoftcapCeShape& shape, cudaStream_t stream) {
  const int64_t cluster_rows = kCluster * kTileRows;
  const double cap = shape.cap;
  KernelArgs args{};
  args.target = in.target;
  args.factor = in.factor;
  args.factor_ld = static_cast<int>(in.factor_ld);
  args.partial_sums = in.partial_sums;
  args.target_logit = in.target_logit;
  args.rows = static_cast<int>(shape.rows);
  args.ignore_index = shape.ignore_index;
  args.vocab = static_cast<int>(shape.vocab);
  args.column_tiles = static_cast<int>((shape.vocab + C::kColumns - 1) / C::kColumns);
  args.row_tiles = static_cast<int>((shape.rows + cluster_rows - 1) / cluster_rows);
  args.slices = static_cast<int>((shape.width + kDepth - 1) / kDepth);
  args.rate = static_cast<float>(2.0 * epilogue::kLog2e / cap);
  args.slope = static_cast<float>(-2.0 * epilogue::kLog2e * cap);

  // What one block of the cluster loads of a tile's columns; see load_columns.
  constexpr int kShare = C::kColumns / kCluster;
  const CUtensorMap hidden =
      tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.hidden, plain_map(shape.rows, shape.width, kTileRows));
  const CUtensorMap weight = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.weight,
                                        C::kPermuted ? permuted_map(shape.vocab, shape.width, kShare)
                                                     : plain_map(shape.vocab, shape.width, kShare));
  const int64_t tiles = static_cast<int64_t>(args.row_tiles) * args.column_tiles;
  // One block per multiprocessor, as its shared memory allows no second one; each takes tiles until none is
  // left.
  const int64_t clusters = multiprocessor_count() / kCluster;

  auto kernel = forward_kernel<C>;
  PGOLF_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned int>((tiles < clusters ? tiles : clusters) * kCluster));
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  PGOLF_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, hidden, weight, args));
}

template <int TileColumns, int Parts, bool Resident, bool Permuted>
void launch_factor(const LinearSoftcapCeForward& in, const LinearSoftcapCeShape& shape, cudaStream_t stream) {
  if (in.factor != nullptr) {
    launch<Config<TileColumns, Parts, Resident, Permuted, true>>(in, shape, stream);
  } else {
    launch<Config<TileColumns, Parts, Resident, Permuted, false>>(in, shape, stream);
  }
}

enum class Form { kResident, kNarrow, kWide, kPlain };

Form choose(const LinearSoftcapCeShape& shape) {
  constexpr int64_t kResidentWeightBytes = 24 << 20;  // half of the L2: all clusters walk it out of step
  if (shape.vocab % 32 != 0) return Form::kPlain;
  const bool resident = shape.width <= kMaxSlices * kDepth && shape.vocab >= 4 * kTileColumns &&
                        shape.vocab * shape.width * 2 <= kResidentWeightBytes;
  if (resident) return Form::kResident;
  // Width 768: 4.32 ms narrow, 4.47 wide; 4096: 15.2 and 12.2 (results/20261124_*_kernels). Between, what is
  // longer in a wide tile, the product or the epilogue: they meet near 1024.
  constexpr int64_t kWideWidth = 2048;
  return shape.width < kWideWidth ? Form::kNarrow : Form::kWide;
}

}  // namespace

bool linear_softcap_ce_sm90_supports(const LinearSoftcapCeShape& shape) {
  constexpr int64_t kMaxRows = int64_t{1} << 30, kMaxVocab = int64_t{1} << 30;
  constexpr int64_t kMaxTiles = int64_t{1} << 30;  // of 128 x 128; their indices have 32 bits
  return shape.width % 8 == 0 && shape.width > 0 && shape.vocab < kMaxVocab && shape.rows < kMaxRows &&
         (shape.rows / 128 + 2) * (shape.vocab / 128 + 1) < kMaxTiles && shape.cap >= kMinCap &&
         shape.cap <= kMaxCap && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

int64_t linear_softcap_ce_sm90_tiles(const LinearSoftcapCeShape& shape) {
  const int64_t columns = choose(shape) == Form::kWide ? kWideColumns : kTileColumns;
  return (shape.vocab + columns - 1) / columns;
}

void linear_softcap_ce_forward_sm90(const LinearSoftcapCeForward& args, const LinearSoftcapCeShape& shape,
                                    CUstream_st* stream) {
  if (shape.rows == 0) return;
  // One kernel template in four sizes; see Config.
  switch (choose(shape)) {
    case Form::kResident:
      return launch_factor<kTileColumns, 2, true, true>(args, shape, stream);
    case Form::kNarrow:
      return launch_factor<kTileColumns, 1, false, true>(args, shape, stream);
    case Form::kWide:
      return launch_factor<kWideColumns, 1, false, true>(args, shape, stream);
    case Form::kPlain:
      return launch_factor<kTileColumns, 2, false, false>(args, shape, stream);
  }
}

}  // namespace pgolf
