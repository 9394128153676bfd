// Hopper kernel of linear_softcap_ce.h: x = hidden weight^T on wgmma, the soft-capped exponential in the
// epilogue.
//
// Persistent blocks, in clusters along the rows, of one producer thread (bulk tensor copies into a ring of
// k slices) and two consumer warpgroups, each of which owns every second 128 x kTileColumns tile: while one
// runs its product on the tensor cores, the other computes its epilogue. The blocks of a cluster work on
// neighbouring row blocks and the same columns, and multicast their share of the weight to each other.
// Where a row block of `hidden` fits shared memory it stays there for all its tiles (kResident).
#include <cuda.h>

#include "kernels/cuda_check.cuh"
#include "kernels/linear_softcap_ce.h"
#include "kernels/linear_softcap_ce_epilogue.cuh"
#include "kernels/ptx_sm90.cuh"
#include "kernels/tensor_map.cuh"

namespace pgolf {
namespace {

constexpr int kTileRows = 128;
constexpr int kTileColumns = 128;
constexpr int kCluster = 2;
constexpr bool kPermute = true;  // of the weight's rows where vocab allows it, see Config
constexpr int kDepth = 64;       // slice of k: 128 bytes, the width of the swizzle
constexpr int kGroup = 128;      // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
constexpr int kSharedLimit = 232448;  // of a block on sm_90
constexpr int kMaxSlices = 8;         // of a resident row block
constexpr int kSliceBytes = kTileRows * kDepth * 2;
constexpr float kMinCap = 1e-6f;
constexpr float kMaxCap = 40.0f;  // exp(-80) = 1.8e-35
constexpr bool kEnabled = true;   // false: callers take the path for any GPU

template <int TileColumns, int Cluster, bool Resident, bool Permuted, bool Factor>
struct Config {
  static constexpr int kColumns = TileColumns;
  static constexpr int kBlocks = Cluster;
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
};

struct KernelArgs : epilogue::Args {
  const int64_t* target;
  int64_t ignore_index;
  int row_tiles;  // of kBlocks row blocks each
  int slices;     // of k
};

// Rows of tiles that a schedule walks down before the next column.
constexpr uint32_t kBand = 8;

// A walk over the tiles of one cluster. Resident: a contiguous range of row-major order, so that `hidden` is
// rarely reloaded. Otherwise every clusters-th tile of an order that walks down kBand row tiles before the
// next column: the tiles of all clusters at one time share few rows and columns, which stay in L2.
template <bool Resident>
struct Walk {
  int count;  // of tiles
  int row, column;
  uint32_t index, stride, row_tiles, column_tiles;

  __device__ __forceinline__ Walk(const KernelArgs& args, uint32_t cluster, uint32_t clusters)
      : row_tiles(args.row_tiles), column_tiles(args.column_tiles) {
    const uint32_t tiles = row_tiles * column_tiles;
    if constexpr (Resident) {
      index = static_cast<uint32_t>(static_cast<uint64_t>(tiles) * cluster / clusters);
      count = static_cast<int>(static_cast<uint64_t>(tiles) * (cluster + 1) / clusters - index);
      stride = 1;
      row = static_cast<int>(index / column_tiles);
      column = static_cast<int>(index % column_tiles);
    } else {
      index = cluster;
      count = static_cast<int>((tiles - cluster + clusters - 1) / clusters);
      stride = clusters;
      locate();
    }
  }

  // `steps` is at most 2.
  __device__ __forceinline__ void advance(int steps) {
    if constexpr (Resident) {
      column += steps;
      while (column >= static_cast<int>(column_tiles)) {
        column -= static_cast<int>(column_tiles);
        ++row;
      }
    } else {
      index += static_cast<uint32_t>(steps) * stride;
      locate();
    }
  }

  __device__ __forceinline__ void locate() {
    const uint32_t band = index / (kBand * column_tiles);
    const uint32_t within = index - band * kBand * column_tiles;
    const uint32_t height = min(static_cast<uint32_t>(kBand), row_tiles - band * kBand);
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

template <typename C>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == C::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int steps) {
    const int laps = (stage + steps) / C::kStages;
    stage += steps - laps * C::kStages;
    phase ^= laps & 1;
  }
};

// Producer.
template <typename C>
__device__ void load_columns(uint32_t to, const CUtensorMap* map, uint32_t full, int slice, int column,
                             uint32_t rank) {
  constexpr int kShare = C::kColumns / C::kBlocks;
  constexpr uint16_t kAll = (1u << C::kBlocks) - 1;
  to += rank * kShare * kDepth * 2;
  const int first = column + static_cast<int>(rank) * kShare;
  if constexpr (C::kPermuted) {
    if constexpr (C::kBlocks == 1) tma_load_5d(to, map, full, slice * kDepth, first / 32);
    if constexpr (C::kBlocks > 1) {
      tma_load_5d_multicast(to, map, full, slice * kDepth, first / 32, kAll);
    }
  } else {
    if constexpr (C::kBlocks == 1) tma_load_2d(to, map, full, slice * kDepth, first);
    if constexpr (C::kBlocks > 1) tma_load_2d_multicast(to, map, full, slice * kDepth, first, kAll);
  }
}

template <typename C>
__device__ void produce(const KernelArgs& args, const Shared<C>& shared, Walk<C::kResident> tile,
                        const CUtensorMap* hidden, const CUtensorMap* weight, uint32_t rank) {
  RingPosition<C> at;
  int row_block = -1;
  uint32_t row_blocks = 0;  // loaded so far
  for (int i = 0; i < tile.count; ++i) {
    const int first_row = (tile.row * C::kBlocks + static_cast<int>(rank)) * kTileRows;
    const bool new_rows = tile.row != row_block;
    for (int slice = 0; slice < args.slices; ++slice) {
      if (C::kResident && new_rows) {
        if (row_blocks > 0) mbarrier_wait_or_trap(shared.rows_empty(slice), (row_blocks - 1) & 1);
        mbarrier_expect_bytes(shared.rows_full(slice), kSliceBytes);
        tma_load_2d(shared.rows(0, slice), hidden, shared.rows_full(slice), slice * kDepth, first_row);
      }
      mbarrier_wait_or_trap(shared.empty(at.stage), at.phase ^ 1);
      const uint32_t full = shared.full(at.stage);
      mbarrier_expect_bytes(full, C::kStageBytes);
      if constexpr (!C::kResident) {
        tma_load_2d(shared.rows(at.stage, slice), hidden, full, slice * kDepth, first_row);
      }
      load_columns<C>(shared.columns(at.stage), weight, full, slice, tile.column * C::kColumns, rank);
      at.advance();
    }
    if (new_rows) {
      row_block = tile.row;
      ++row_blocks;
    }
    tile.advance(1);
  }
}

// The target's column, epilogue::kNowhere or epilogue::kIgnored; the logits of both are written here.
__device__ __forceinline__ int load_target(const KernelArgs& args, int64_t row) {
  if (row >= args.rows) return epilogue::kIgnored;
  const int64_t label = args.target[row];
  if (label != args.ignore_index && label >= 0 && label < args.vocab) return static_cast<int>(label);
  const bool ignored = label == args.ignore_index;
  args.target_logit[row] = ignored ? 0.0f : __int_as_float(0x7fffffff);
  return ignored ? epilogue::kIgnored : epilogue::kNowhere;
}

struct Place {
  int64_t first_row;  // of this thread
  int column_tile;
  int t;  // lane % 4
};

// One of the two rows that this thread holds of 64.
template <typename C, bool Inside, int Half>
__device__ __forceinline__ void finish_row(const KernelArgs& args, const float (&c)[C::kAccumulators],
                                           int target, int64_t row, const Place& place) {
  float value[C::kColumns / 4];
  PGOLF_UNROLL
  for (int i = 0; i < C::kColumns / 4; ++i) value[i] = c[i / 2 * 4 + Half * 2 + i % 2];
  epilogue::Row<C>{args, value, row, place.column_tile, place.t}.template run<Inside>(target);
}

template <typename C, bool Inside>
__device__ __forceinline__ void finish_tile(const KernelArgs& args, const float (&c)[2][C::kAccumulators],
                                            const int (&target)[4], const Place& place) {
  finish_row<C, Inside, 0>(args, c[0], target[0], place.first_row, place);
  finish_row<C, Inside, 1>(args, c[0], target[1], place.first_row + 8, place);
  finish_row<C, Inside, 0>(args, c[1], target[2], place.first_row + 64, place);
  finish_row<C, Inside, 1>(args, c[1], target[3], place.first_row + 72, place);
}

// A tile's product, once this group's turn has come.
template <typename C>
__device__ __forceinline__ void multiply(const KernelArgs& args, const Shared<C>& shared, RingPosition<C>& at,
                                         float (&c)[2][C::kAccumulators], int group, bool await_rows,
                                         uint32_t rows_phase, bool release_rows, bool last_tile) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t previous = 0;
  for (int slice = 0; slice < args.slices; ++slice) {
    if (C::kResident && await_rows) mbarrier_wait_or_trap(shared.rows_full(slice), rows_phase);
    mbarrier_wait_or_trap(shared.full(at.stage), at.phase);
    // All of this group's copies have arrived: the other group's waits are at most one phase ahead.
    if (slice == args.slices - 1 && !last_tile) named_arrive(2 - group, 2 * kGroup);
    const uint64_t a = wgmma_descriptor<16>(shared.rows(at.stage, slice));
    const uint64_t b = wgmma_descriptor<16>(shared.columns(at.stage));
    wgmma_fence();
    PGOLF_UNROLL
    for (int k = 0; k < kDepth / 16; ++k) {
      const int accumulate = slice > 0 || k > 0;
      wgmma_64x128x16<true, true>(c[0], wgmma_advance(a, k * 32), wgmma_advance(b, k * 32), accumulate,
                                  __nv_bfloat16{});
      wgmma_64x128x16<true, true>(c[1], wgmma_advance(a, k * 32 + 64 * kDepth * 2), wgmma_advance(b, k * 32),
                                  accumulate, __nv_bfloat16{});
    }
    wgmma_commit();
    if (slice > 0) {
      wgmma_wait<1>();
      if (lane < C::kBlocks) mbarrier_arrive_cluster(previous, lane);
      if (C::kResident && release_rows && lane == 0) mbarrier_arrive(shared.rows_empty(slice - 1));
    }
    previous = shared.empty(at.stage);
    at.advance();
  }
  wgmma_wait<0>();
  wgmma_keep_order(c[0]);
  wgmma_keep_order(c[1]);
  if (lane < C::kBlocks) mbarrier_arrive_cluster(previous, lane);
  if (C::kResident && release_rows && lane == 0) mbarrier_arrive(shared.rows_empty(args.slices - 1));
}

template <typename C>
__device__ void consume(const KernelArgs& args, const Shared<C>& shared, Walk<C::kResident> tile,
                        uint32_t rank) {
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroup - 1, 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, t = lane % 4;
  RingPosition<C> at;
  at.skip(group * args.slices);
  const int first_row_block = tile.row;
  if (group == 1) {
    tile.advance(1);
    // The first row block of the schedule is released by both groups even if one has no tile in it.
    if (C::kResident && tile.count > 1 && tile.row != first_row_block && lane == 0) {
      for (int slice = 0; slice < args.slices; ++slice) mbarrier_arrive(shared.rows_empty(slice));
    }
  }
  int row_block = -1;
  int target[4];  // of rows +0, +8, +64, +72
  for (int i = group; i < tile.count; i += 2) {
    const int column_tile = tile.column;
    const bool new_rows = tile.row != row_block;
    row_block = tile.row;
    tile.advance(2);
    const bool release_rows = i + 2 >= tile.count || tile.row != row_block;
    const int64_t first_row =
        (static_cast<int64_t>(row_block) * C::kBlocks + rank) * kTileRows + warp * 16 + lane / 4;
    if (new_rows || !C::kResident) {
      PGOLF_UNROLL
      for (int r = 0; r < 4; ++r) target[r] = load_target(args, first_row + r / 2 * 64 + r % 2 * 8);
    }

    float c[2][C::kAccumulators];
    // Tiles take turns on the tensor cores.
    if (i > 0) named_sync(1 + group, 2 * kGroup);
    multiply<C>(args, shared, at, c, group, new_rows, (row_block - first_row_block) & 1, release_rows,
                i + 1 >= tile.count);
    at.skip(args.slices);

    const Place place{first_row, column_tile, t};
    if ((column_tile + 1) * C::kColumns <= args.vocab) {
      finish_tile<C, true>(args, c, target, place);
    } else {
      finish_tile<C, false>(args, c, target, place);
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap hidden, const __grid_constant__ CUtensorMap weight,
                   const __grid_constant__ KernelArgs args) {
  extern __shared__ unsigned char shared_bytes[];
  const Shared<C> shared(shared_address(shared_bytes));
  const uint32_t rank = C::kBlocks > 1 ? cluster_rank() : 0;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), 4 * C::kBlocks);  // the warps of one group in each block
    }
    for (int slice = 0; slice < kMaxSlices; ++slice) {
      mbarrier_init(shared.rows_full(slice), 1);
      mbarrier_init(shared.rows_empty(slice), 8);
    }
    mbarrier_init_fence();
    tma_prefetch(&hidden);
    tma_prefetch(&weight);
  }
  if constexpr (C::kBlocks > 1) cluster_sync();
  __syncthreads();

  const Walk<C::kResident> tiles(args, blockIdx.x / C::kBlocks, gridDim.x / C::kBlocks);
  if (threadIdx.x < kGroup) {
    registers_lower<kProducerRegisters>();
    if (threadIdx.x == 0) produce<C>(args, shared, tiles, &hidden, &weight, rank);
    __syncwarp();
  } else {
    registers_raise<kConsumerRegisters>();
    consume<C>(args, shared, tiles, rank);
  }
  // Shared memory must outlive the copies and arrivals that come from the other blocks.
  if constexpr (C::kBlocks > 1) cluster_sync();
}

// Launcher.
TensorShape plain_map(int64_t rows, int64_t width, int box_rows) {
  const auto row_bytes = static_cast<cuuint64_t>(width) * 2;
  return {2,
          {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)},
          {row_bytes},
          {kDepth, static_cast<cuuint32_t>(box_rows)}};
}

// Row 32 m + 8 t + 2 j + e of the matrix becomes row 32 m + 8 j + 2 t + e of the copy.
TensorShape permuted_map(int64_t rows, int64_t width, int box_rows) {
  const auto row_bytes = static_cast<cuuint64_t>(width) * 2;
  return {5,
          {static_cast<cuuint64_t>(width), 2, 4, 4, static_cast<cuuint64_t>(rows) / 32},
          {row_bytes, 8 * row_bytes, 2 * row_bytes, 32 * row_bytes},
          {kDepth, 2, 4, 4, static_cast<cuuint32_t>(box_rows / 32)}};
}

template <typename C>
void launch(const LinearSoftcapCeForward& in, const LinearSoftcapCeShape& shape, cudaStream_t stream) {
  const int64_t cluster_rows = C::kBlocks * kTileRows;
  const double cap = shape.cap;
  KernelArgs args{};
  args.target = in.target;
  args.factor = in.factor;
  args.factor_ld = in.factor_ld;
  args.partial_sums = in.partial_sums;
  args.target_logit = in.target_logit;
  args.rows = shape.rows;
  args.ignore_index = shape.ignore_index;
  args.vocab = static_cast<int>(shape.vocab);
  args.column_tiles = static_cast<int>((shape.vocab + C::kColumns - 1) / C::kColumns);
  args.row_tiles = static_cast<int>((shape.rows + cluster_rows - 1) / cluster_rows);
  args.slices = static_cast<int>((shape.width + kDepth - 1) / kDepth);
  args.rate = static_cast<float>(2.0 * epilogue::kLog2e / cap);
  args.slope = static_cast<float>(-2.0 * epilogue::kLog2e * cap);

  constexpr int kShare = C::kColumns / C::kBlocks;
  const CUtensorMap hidden =
      tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.hidden, plain_map(shape.rows, shape.width, kTileRows));
  const CUtensorMap weight = tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, in.weight,
                                        C::kPermuted ? permuted_map(shape.vocab, shape.width, kShare)
                                                     : plain_map(shape.vocab, shape.width, kShare));
  const int64_t tiles = static_cast<int64_t>(args.row_tiles) * args.column_tiles;
  const int64_t clusters = multiprocessor_count() / C::kBlocks;

  auto kernel = forward_kernel<C>;
  PGOLF_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = C::kBlocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned int>((tiles < clusters ? tiles : clusters) * C::kBlocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  PGOLF_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, hidden, weight, args));
}

template <int TileColumns, int Cluster, bool Resident, bool Permuted>
void launch_factor(const LinearSoftcapCeForward& in, const LinearSoftcapCeShape& shape, cudaStream_t stream) {
  if (in.factor != nullptr) {
    launch<Config<TileColumns, Cluster, Resident, Permuted, true>>(in, shape, stream);
  } else {
    launch<Config<TileColumns, Cluster, Resident, Permuted, false>>(in, shape, stream);
  }
}

}  // namespace

bool linear_softcap_ce_sm90_supports(const LinearSoftcapCeShape& shape) {
  constexpr int64_t kMaxRows = int64_t{1} << 30, kMaxVocab = int64_t{1} << 30;
  constexpr int64_t kMaxTiles = int64_t{1} << 30;  // of 128 x 128; their indices have 32 bits
  return kEnabled && shape.width % 8 == 0 && shape.width > 0 && shape.vocab < kMaxVocab &&
         shape.rows < kMaxRows && (shape.rows / 128 + 2) * (shape.vocab / 128 + 1) < kMaxTiles &&
         shape.cap >= kMinCap && shape.cap <= kMaxCap &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

int64_t linear_softcap_ce_sm90_tiles(int64_t vocab) { return (vocab + kTileColumns - 1) / kTileColumns; }

void linear_softcap_ce_forward_sm90(const LinearSoftcapCeForward& args, const LinearSoftcapCeShape& shape,
                                    CUstream_st* stream) {
  if (shape.rows == 0) return;
  constexpr int64_t kResidentWeightBytes = 24 << 20;  // half of the L2: all clusters walk it out of step
  const bool permuted = kPermute && shape.vocab % 32 == 0;
  const bool resident = (permuted || !kPermute) && shape.width <= kMaxSlices * kDepth &&
                        shape.vocab >= 4 * kTileColumns &&
                        shape.vocab * shape.width * 2 <= kResidentWeightBytes;
  if (resident) {
    launch_factor<kTileColumns, kCluster, true, kPermute>(args, shape, stream);
  } else if (permuted) {
    launch_factor<kTileColumns, kCluster, false, kPermute>(args, shape, stream);
  } else {
    launch_factor<kTileColumns, kCluster, false, false>(args, shape, stream);
  }
}

}  // namespace pgolf
