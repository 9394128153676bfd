// Launches of newton_schulz_sm90.h: two kernels that normalise, then one that runs every product.
#include <algorithm>

#include "kernels/convert.cuh"
#include "kernels/cuda_check.cuh"
#include "kernels/newton_schulz_sm90_products.cuh"
#include "kernels/newton_schulz_sm90_scale.cuh"
#include "kernels/newton_schulz_sm90_schedule.h"
#include "kernels/tensor_map.cuh"

namespace pgolf {
namespace {

using namespace ns90;

// ---- Normalising

struct NormalizeBank {
  const void* in;
  __half* x;
  NsType type;
  int64_t count;  // elements per matrix, a multiple of 8
  int chunks;     // per matrix
  int first_block, first_matrix;
};

struct NormalizePlan {
  NormalizeBank banks[kMaxBanks];
  int bank_count;
  float *partials, *sigma;
  uint32_t* counters;
  int counter_count;
  float eps;
};

__device__ __forceinline__ const NormalizeBank& bank_of(const NormalizePlan& plan, int block) {
  int i = 0;
  while (i + 1 < plan.bank_count && block >= plan.banks[i + 1].first_block) ++i;
  return plan.banks[i];
}

__device__ __forceinline__ void load8(float (&value)[8], const void* in, NsType type, int64_t at) {
  if (type == NsType::kFloat32) {
    const float4 lo = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(in) + at));
    const float4 hi = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(in) + at) + 1);
    // Two loads of 16 bytes each.
    const float both[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
    PGOLF_UNROLL
    for (int i = 0; i < 8; ++i) value[i] = both[i];
    return;
  }
  // Eight 16-bit elements; bfloat16 is the upper half of a float32, so a shift or a mask widens it.
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(in) + at));
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  PGOLF_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (type == NsType::kBfloat16) {
      value[2 * i] = __uint_as_float(words[i] << 16);
      value[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      value[2 * i] = pair.x;
      value[2 * i + 1] = pair.y;
    }
  }
}

__global__ void __launch_bounds__(kCastThreads) squares_kernel(const __grid_constant__ NormalizePlan plan) {
  __shared__ float staged[3][kCastThreads / kWarp];
  const int block = static_cast<int>(blockIdx.x);
  const NormalizeBank& bank = bank_of(plan, block);
  const int local = block - bank.first_block;
  const int matrix = local / bank.chunks;
  const int64_t begin = static_cast<int64_t>(local - matrix * bank.chunks) * kChunk;
  // Three sums at three scales: one of them neither overflows nor underflows, whatever the matrix.
  Squares squares;
  PGOLF_UNROLL
  for (int i = 0; i < kChunk / (kCastThreads * 8); ++i) {
    const int64_t at = begin + (i * kCastThreads + static_cast<int>(threadIdx.x)) * 8;
    if (at >= bank.count) break;
    float value[8];
    load8(value, bank.in, bank.type, matrix * bank.count + at);
    PGOLF_UNROLL
    for (int l = 0; l < 8; ++l) squares.add(value[l]);
  }
  const float sum = block_sum<kCastThreads>(squares.sum, staged[0]);
  const float low = block_sum<kCastThreads>(squares.low, staged[1]);
  const float high = block_sum<kCastThreads>(squares.high, staged[2]);
  // Partial sums instead of atomics: the order of the additions, and so the result, stays the same.
  if (threadIdx.x == 0) {
    float* partials = plan.partials + 3 * block;
    partials[0] = sum;
    partials[1] = low;
    partials[2] = high;
  }
}

__global__ void __launch_bounds__(kCastThreads) cast_kernel(const __grid_constant__ NormalizePlan plan) {
  __shared__ float staged[3][kCastThreads / kWarp];
  __shared__ Scale shared_scale;
  const int block = static_cast<int>(blockIdx.x);
  // The products start after this kernel, so that one block may zero their counters.
  if (block == 0) {
    for (int i = threadIdx.x; i < plan.counter_count; i += kCastThreads) plan.counters[i] = 0;
  }
  const NormalizeBank& bank = bank_of(plan, block);
  const int local = block - bank.first_block;
  const int matrix = local / bank.chunks;
  const int chunk = local - matrix * bank.chunks;
  // Every block of a matrix adds the same numbers in the same order, and so finds the same scale.
  float sums[3] = {0.0f, 0.0f, 0.0f};
  const float* partials = plan.partials + 3 * static_cast<int64_t>(block - chunk);
  for (int i = threadIdx.x; i < bank.chunks; i += kCastThreads) {
    PGOLF_UNROLL
    for (int l = 0; l < 3; ++l) sums[l] += partials[3 * i + l];
  }
  PGOLF_UNROLL
  for (int l = 0; l < 3; ++l) sums[l] = block_sum<kCastThreads>(sums[l], staged[l]);
  if (threadIdx.x == 0) {
    shared_scale = scale_of(sums[0], sums[1], sums[2], plan.eps);
    if (chunk == 0) plan.sigma[bank.first_matrix + matrix] = shared_scale.sigma;
  }
  __syncthreads();
  // A power of two keeps bfloat16 and float16 input exact; the rest of 1 / (norm + eps) is sigma.
  const PowerOfTwo power(shared_scale.exponent);
  PGOLF_UNROLL
  for (int i = 0; i < kChunk / (kCastThreads * 8); ++i) {
    const int64_t at =
        static_cast<int64_t>(chunk) * kChunk + (i * kCastThreads + static_cast<int>(threadIdx.x)) * 8;
    if (at >= bank.count) break;
    float value[8];
    load8(value, bank.in, bank.type, matrix * bank.count + at);
    Pack<__half> pack;
    PGOLF_UNROLL
    for (int l = 0; l < 8; ++l) pack.value[l] = __float2half_rn(power(value[l]));
    *reinterpret_cast<Pack<__half>*>(bank.x + matrix * bank.count + at) = pack;
  }
}

// ---- Products

// A buffer of a bank as the copy engine sees it, and where it starts.
struct BufferView {
  const void* first;
  TensorShape shape;  // with boxes of 64 rows
};

unsigned char* address_of(const NsBank& bank, const BufferLayout& buffer, unsigned char* workspace) {
  return (buffer.in_output ? static_cast<unsigned char*>(bank.out) : workspace) + buffer.offset;
}

BufferView view(const NsBank& bank, const BankLayout& layout, int buffer, unsigned char* workspace) {
  const BufferLayout found = find_buffer(bank, layout, buffer);
  const TensorShape shape{
      .rank = 3,
      .sizes = {static_cast<cuuint64_t>(found.cols), static_cast<cuuint64_t>(found.rows),
                static_cast<cuuint64_t>(bank.batch)},
      .strides = {static_cast<cuuint64_t>(2 * found.cols), static_cast<cuuint64_t>(2 * found.stride)},
      .box = {kBox, kBox, 1}};
  return {address_of(bank, found, workspace), shape};
}

void encode_maps(const NsBank& bank, const BankLayout& layout, unsigned char* workspace, int first_map,
                 Plan& plan) {
  // Every buffer has two maps of the same memory, as it may be read along its rows and along its columns.
  for (int buffer = 0; buffer < kMapsPerBank; ++buffer) {
    if (!has_buffer(bank, layout, buffer)) continue;
    BufferView seen = view(bank, layout, buffer, workspace);
    plan.maps[first_map + buffer] = tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT16, seen.first, seen.shape);
    seen.shape.box[1] = kTile;
    plan.maps[kFirstTallMap + first_map + buffer] =
        tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT16, seen.first, seen.shape);
  }
}

// Where the products of a bank start from.
__half* first_x(const NsBank& bank, const BankLayout& layout, unsigned char* workspace) {
  const BufferLayout found = find_buffer(bank, layout, layout.starts_in_out ? kOut : kX);
  return reinterpret_cast<__half*>(address_of(bank, found, workspace));
}

// Addresses of what lies at the head of the workspace.
struct Head {
  float *partials, *sigma;
  uint32_t* counters;

  Head(unsigned char* workspace, const WorkspaceLayout& layout)
      : partials(reinterpret_cast<float*>(workspace + layout.partials)),
        sigma(reinterpret_cast<float*>(workspace + layout.sigma)),
        counters(reinterpret_cast<uint32_t*>(workspace + layout.counters)) {}
};

// How the current device runs the banks of one launch.
struct Launch {
  int multiprocessors;
  Tuning tuning;
  WorkspaceLayout layout;

  Launch(const NsBank* banks, int count, int steps)
      : multiprocessors(multiprocessor_count()),
        tuning(tune(banks, count, multiprocessors)),
        layout(banks, count, steps, tuning) {}
};

void launch_normalise(const NsBank* banks, int count, const WorkspaceLayout& layout, float eps,
                      unsigned char* workspace, cudaStream_t stream) {
  const Head head(workspace, layout);
  NormalizePlan plan{};
  // Blocks are numbered through all banks; a block finds its bank by first_block.
  int matrices = 0, blocks = 0;
  for (int i = 0; i < count; ++i) {
    const NsBank& bank = banks[i];
    plan.banks[i] = {.in = bank.in,
                     .x = first_x(bank, layout.banks[i], workspace),
                     .type = bank.type,
                     .count = bank.rows * bank.cols,
                     .chunks = static_cast<int>(chunks_of(bank)),
                     .first_block = blocks,
                     .first_matrix = matrices};
    blocks += static_cast<int>(bank.batch * chunks_of(bank));
    matrices += static_cast<int>(bank.batch);
  }
  plan.bank_count = count;
  plan.partials = head.partials;
  plan.sigma = head.sigma;
  plan.counters = head.counters;
  plan.counter_count = layout.counter_count;
  plan.eps = eps;
  // Two kernels, because the cast needs the norm of the whole matrix. One kernel with a cluster per matrix
  // was 0.15 ms slower (docs/findings.md, 2026-11-23).
  squares_kernel<<<blocks, kCastThreads, 0, stream>>>(plan);
  PGOLF_LAUNCH_CHECK();
  cast_kernel<<<blocks, kCastThreads, 0, stream>>>(plan);
  PGOLF_LAUNCH_CHECK();
}

void launch_products(const NsBank* banks, int count, const float (*table)[3], int steps, const Launch& launch,
                     unsigned char* workspace, cudaStream_t stream) {
  const WorkspaceLayout& layout = launch.layout;
  const Head head(workspace, layout);
  Plan plan{};
  for (int i = 0; i < count; ++i) encode_maps(banks[i], layout.banks[i], workspace, i * kMapsPerBank, plan);
  const int tasks =
      schedule(banks, count, table, steps, layout, launch.tuning, launch.multiprocessors, plan.queue);
  plan.queue.sigma = head.sigma;
  plan.queue.done = head.counters;
  // The head of the queue is the last counter, which is zeroed with the others.
  plan.queue.next = head.counters + layout.counter_count - 1;
  PGOLF_CUDA_CHECK(
      cudaFuncSetAttribute(products_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  // One block per multiprocessor; each takes tasks until the queue is empty.
  products_kernel<<<std::min(tasks, launch.multiprocessors), kThreads, kSharedBytes, stream>>>(plan, tasks);
  PGOLF_LAUNCH_CHECK();
}

}  // namespace

bool newton_schulz_sm90_can_run(const NsBank* banks, int count) {
  int device = 0, major = 0;
  // No exception where there is no device: the caller takes other kernels.
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  if (major != 9) return false;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return std::all_of(banks, banks + count, [&](const NsBank& bank) {
    return shape_fits(bank) && aligned(bank.in) && aligned(bank.out);
  });
}

size_t newton_schulz_sm90_workspace(const NsBank* banks, int count, int steps) {
  size_t most = 0;
  for (int first = 0, here = 0; first < count; first += here) {
    here = banks_of_launch(banks + first, count - first, steps);
    most = std::max(most, Launch(banks + first, here, steps).layout.bytes);
  }
  return most;
}

int newton_schulz_sm90_prepare(const NsBank* banks, int count, int steps, void* workspace,
                               NsPrepared* prepared) {
  const int here = banks_of_launch(banks, count, steps);
  const WorkspaceLayout layout = Launch(banks, here, steps).layout;
  auto* const bytes = static_cast<unsigned char*>(workspace);
  for (int i = 0; i < here; ++i) prepared->x[i] = first_x(banks[i], layout.banks[i], bytes);
  const Head head(bytes, layout);
  prepared->sigma = head.sigma;
  prepared->partials = head.partials;
  prepared->counters = head.counters;
  prepared->counter_count = layout.counter_count;
  return here;
}

void newton_schulz_sm90_prepared(const NsBank* banks, int count, const float (*coefficients)[3], int steps,
                                 void* workspace, CUstream_st* stream) {
  launch_products(banks, count, coefficients, steps, Launch(banks, count, steps),
                  static_cast<unsigned char*>(workspace), stream);
}

void newton_schulz_sm90(const NsBank* banks, int count, const float (*coefficients)[3], int steps, float eps,
                        void* workspace, CUstream_st* stream) {
  auto* const bytes = static_cast<unsigned char*>(workspace);
  for (int first = 0, here = 0; first < count; first += here) {
    const NsBank* const some = banks + first;
    here = banks_of_launch(some, count - first, steps);
    const Launch launch(some, here, steps);
    launch_normalise(some, here, launch.layout, eps, bytes, stream);
    launch_products(some, here, coefficients, steps, launch, bytes, stream);
  }
}

}  // namespace pgolf
