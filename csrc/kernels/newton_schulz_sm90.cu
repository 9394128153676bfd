// Launches of newton_schulz_sm90.h: two kernels that normalise, then one that runs every product.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "kernels/convert.cuh"
#include "kernels/cuda_check.cuh"
#include "kernels/newton_schulz_sm90_products.cuh"
#include "kernels/newton_schulz_sm90_queue.h"
#include "kernels/newton_schulz_sm90_scale.cuh"
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
  Words words;
  int counters;
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
    value[0] = lo.x, value[1] = lo.y, value[2] = lo.z, value[3] = lo.w;
    value[4] = hi.x, value[5] = hi.y, value[6] = hi.z, value[7] = hi.w;
    return;
  }
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(in) + at));
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  PGOLF_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (type == NsType::kBfloat16) {
      value[2 * i] = __uint_as_float(words[i] << 16);
      value[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      value[2 * i] = pair.x, value[2 * i + 1] = pair.y;
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
  if (threadIdx.x == 0) {
    float* partials = plan.words.partials + 3 * block;
    partials[0] = sum, partials[1] = low, partials[2] = high;
  }
}

__global__ void __launch_bounds__(kCastThreads) cast_kernel(const __grid_constant__ NormalizePlan plan) {
  __shared__ float staged[3][kCastThreads / kWarp];
  __shared__ Scale shared_scale;
  const int block = static_cast<int>(blockIdx.x);
  if (block == 0) {
    for (int i = threadIdx.x; i < plan.counters; i += kCastThreads) plan.words.done[i] = 0;
  }
  const NormalizeBank& bank = bank_of(plan, block);
  const int local = block - bank.first_block;
  const int matrix = local / bank.chunks;
  const int chunk = local - matrix * bank.chunks;
  float sums[3] = {0.0f, 0.0f, 0.0f};
  const float* partials = plan.words.partials + 3 * static_cast<int64_t>(block - chunk);
  for (int i = threadIdx.x; i < bank.chunks; i += kCastThreads) {
    PGOLF_UNROLL
    for (int l = 0; l < 3; ++l) sums[l] += partials[3 * i + l];
  }
  PGOLF_UNROLL
  for (int l = 0; l < 3; ++l) sums[l] = block_sum<kCastThreads>(sums[l], staged[l]);
  if (threadIdx.x == 0) {
    shared_scale = scale_of(sums[0], sums[1], sums[2], plan.eps);
    if (chunk == 0) plan.words.sigma[bank.first_matrix + matrix] = shared_scale.sigma;
  }
  __syncthreads();
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

TensorShape shape_of(const Place& place, int64_t batch, int box_rows) {
  return {3,
          {static_cast<cuuint64_t>(place.cols), static_cast<cuuint64_t>(place.rows),
           static_cast<cuuint64_t>(batch)},
          {static_cast<cuuint64_t>(2 * place.cols), static_cast<cuuint64_t>(2 * place.batch)},
          {kBox, static_cast<cuuint32_t>(box_rows), 1}};
}

// How many of the banks one launch takes.
int banks_of_launch(const NsBank* banks, int count, int steps) {
  int here = 0, products = 0;
  while (here < std::min(count, kMaxBanks) && products + product_count(banks[here], steps) <= kMaxProducts) {
    products += product_count(banks[here++], steps);
  }
  return here;
}

// Tiles of a task, and the length of the chains. Two tiles of a row share an operand (66 matrices on one
// H100: 0.583 ms, 0.604 with single tiles, 0.613 with four of an update). With few tiles single ones make
// each matrix' chain of products shorter; the warpgroups share a tile only where most multiprocessors would
// have none (ten matrices in long chains: 0.195 ms, 0.202 with shared tiles). Short chains take more work,
// which needs idle multiprocessors (products of those ten: 0.1755 ms, 0.1836 in long chains; with four steps
// instead of five 0.1362 and 0.1449).
Tuning tune(const NsBank* banks, int count) {
  const int multiprocessors = multiprocessor_count();
  int64_t panels = 0;
  for (int i = 0; i < count; ++i) {
    panels += banks[i].batch * tiles_of(std::min(banks[i].rows, banks[i].cols), kTile);
  }
  const int chunk = panels < multiprocessors ? 1 : 2;
  return {chunk, chunk, panels * 4 < multiprocessors, panels * 3 < multiprocessors};
}

void launch_products(const Plan& plan, int tasks, int multiprocessors, cudaStream_t stream) {
  PGOLF_CUDA_CHECK(
      cudaFuncSetAttribute(products_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const int blocks = std::min(tasks, multiprocessors);
  products_kernel<<<blocks, kThreads, kSharedBytes, stream>>>(plan, tasks);
  PGOLF_LAUNCH_CHECK();
}

void run_banks(const NsBank* banks, int count, const float (*table)[3], int steps, bool prepared, float eps,
               unsigned char* workspace, cudaStream_t stream) {
  const int multiprocessors = multiprocessor_count();
  const Tuning tuning = tune(banks, count);
  Plan plan{};
  NormalizePlan scale{};
  std::vector<std::vector<Product>> chains;
  std::vector<int> batches;
  size_t at = words_bytes(banks, count);
  int matrices = 0, blocks = 0;
  for (int i = 0; i < count; ++i) {
    const NsBank& bank = banks[i];
    const BankSpace space(bank, steps, tuning, at);
    at = space.end;
    const int first_map = i * kMapsPerBank;
    for (int buffer = 0; buffer < kMapsPerBank; ++buffer) {
      const bool square = buffer >= kSquaresOut && buffer < kFactor;
      const int64_t fitting =
          space.brief ? 3 : std::max(bank.rows, bank.cols) / std::min(bank.rows, bank.cols);
      if (square && (buffer - kSquaresOut) % 3 >= fitting) continue;  // no product names it
      const Place place = place_of(bank, workspace, space, buffer);
      plan.maps[first_map + buffer] =
          tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT16, place.first, shape_of(place, bank.batch, kBox));
      plan.maps[kTallBoxes + first_map + buffer] =
          tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT16, place.first, shape_of(place, bank.batch, kTile));
    }
    Chain chain(bank, workspace, space, first_map, matrices, tuning);
    chains.push_back(chain.run(table, steps));
    batches.push_back(static_cast<int>(bank.batch));
    scale.banks[i] = {bank.in,
                      first_x(bank, steps, workspace, space),
                      bank.type,
                      bank.rows * bank.cols,
                      static_cast<int>(chunks_of(bank)),
                      blocks,
                      matrices};
    blocks += static_cast<int>(bank.batch * chunks_of(bank));
    matrices += static_cast<int>(bank.batch);
  }
  const Words words(workspace, banks, count);
  plan.matrices = matrices;
  plan.sigma = words.sigma;
  plan.done = words.done;
  plan.queue = words.queue;

  const int tasks = queue_products(plan, chains, batches, multiprocessors);
  if (!prepared) {
    scale.bank_count = count;
    scale.words = words;
    scale.counters = counter_count(matrices);
    scale.eps = eps;
    squares_kernel<<<blocks, kCastThreads, 0, stream>>>(scale);
    PGOLF_LAUNCH_CHECK();
    cast_kernel<<<blocks, kCastThreads, 0, stream>>>(scale);
    PGOLF_LAUNCH_CHECK();
  }
  launch_products(plan, tasks, multiprocessors, stream);
}

}  // namespace

bool newton_schulz_sm90_can_run(const NsBank* banks, int count) {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  if (major != 9) return false;
  for (int i = 0; i < count; ++i) {
    const NsBank& bank = banks[i];
    if (bank.batch < 1 || bank.rows < 8 || bank.cols < 8 || bank.rows % 8 != 0 || bank.cols % 8 != 0)
      return false;
    if (bank.batch * chunks_of(bank) >= (1 << 24)) return false;
    if (bank.batch >= (1 << 20) || bank.rows > (1 << 16) || bank.cols > (1 << 16)) return false;
    if (reinterpret_cast<uintptr_t>(bank.in) % 16 != 0 || reinterpret_cast<uintptr_t>(bank.out) % 16 != 0)
      return false;
  }
  return true;
}

size_t newton_schulz_sm90_workspace(const NsBank* banks, int count, int steps) {
  size_t most = 0;
  for (int first = 0, here = 0; first < count; first += here) {
    here = banks_of_launch(banks + first, count - first, steps);
    const Tuning tuning = tune(banks + first, here);
    size_t at = words_bytes(banks + first, here);
    for (int i = 0; i < here; ++i) at = BankSpace(banks[first + i], steps, tuning, at).end;
    most = std::max(most, at);
  }
  return most;
}

int newton_schulz_sm90_prepare(const NsBank* banks, int count, int steps, void* workspace,
                               NsPrepared* prepared) {
  const int here = banks_of_launch(banks, count, steps);
  const Tuning tuning = tune(banks, here);
  auto* bytes = static_cast<unsigned char*>(workspace);
  size_t at = words_bytes(banks, here);
  int matrices = 0;
  for (int i = 0; i < here; ++i) {
    const BankSpace space(banks[i], steps, tuning, at);
    at = space.end;
    prepared->x[i] = first_x(banks[i], steps, bytes, space);
    matrices += static_cast<int>(banks[i].batch);
  }
  const Words words(bytes, banks, here);
  prepared->sigma = words.sigma;
  prepared->partials = words.partials;
  prepared->counters = words.done;
  prepared->counter_count = counter_count(matrices);
  return here;
}

void newton_schulz_sm90_prepared(const NsBank* banks, int count, const float (*coefficients)[3], int steps,
                                 void* workspace, CUstream_st* stream) {
  run_banks(banks, count, coefficients, steps, true, 0.0f, static_cast<unsigned char*>(workspace), stream);
}

void newton_schulz_sm90(const NsBank* banks, int count, const float (*coefficients)[3], int steps, float eps,
                        void* workspace, CUstream_st* stream) {
  for (int first = 0, here = 0; first < count; first += here) {
    here = banks_of_launch(banks + first, count - first, steps);
    run_banks(banks + first, here, coefficients, steps, false, eps, static_cast<unsigned char*>(workspace),
              stream);
  }
}

}  // namespace pgolf
