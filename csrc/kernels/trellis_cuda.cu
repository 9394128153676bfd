// CUDA kernel of trellis.h: one block per chain, one thread per state. Each step reads two metrics from
// shared memory and writes one; the 256 decisions of a step are eight ballots. The path is then read back by
// one thread, and every thread turns its place of the path into a value.
#include "kernels/cuda_check.cuh"
#include "kernels/trellis.h"

namespace pgolf {
namespace {

constexpr int kStates = kTrellisStates, kHalf = kStates / 2, kWords = kStates / 32;
constexpr float kUnreached = 1e30f;  // of the states that no path has come to yet

// The residue of n mod 4 on the way into a state from its predecessor s / 2; from the other one, s / 2 + 128,
// it is this ^ 2.
__device__ __forceinline__ int residue_into(int state) {
  const uint32_t from = static_cast<uint32_t>(state) >> 1;
  const uint32_t code = (static_cast<uint32_t>(state) & 1) ^ trellis_parity(from & kTrellisInput);
  return static_cast<int>(2 * code + trellis_parity(from & kTrellisSide));
}

__global__ void __launch_bounds__(kStates)
    trellis_round(const float* x, float* value, int64_t n, int64_t chains) {
  __shared__ float target[kTrellisChain];  // in units of half a step: n would be this
  __shared__ float metric[2][kStates];
  __shared__ uint32_t decided[kTrellisChain][kWords];  // bit s: state s was reached from s / 2 + 128
  __shared__ uint16_t path[kTrellisChain];             // state after the step, and its decision in bit 8
  const int64_t row = blockIdx.x / chains, begin = (blockIdx.x - row * chains) * kTrellisChain;
  const int length = static_cast<int>(min(static_cast<int64_t>(kTrellisChain), n - begin));
  const int64_t first = row * n + begin;
  const int state = static_cast<int>(threadIdx.x);
  for (int t = state; t < length; t += kStates) target[t] = 2.0f * x[first + t] + 0.5f;
  metric[0][state] = state == 0 ? 0.0f : kUnreached;
  const float residue = static_cast<float>(residue_into(state));
  __syncthreads();
  for (int t = 0; t < length; ++t) {
    const float off = target[t] - residue;
    const float near = fabsf(off - 4.0f * rintf(0.25f * off)), far = 2.0f - near;
    const float* before = metric[t & 1];
    const float a = before[state >> 1] + near * near;
    const float b = before[(state >> 1) + kHalf] + far * far;
    const bool other = b < a;
    metric[(t + 1) & 1][state] = other ? b : a;
    const uint32_t ballot = __ballot_sync(0xffffffffu, other);
    if (state % 32 == 0) decided[t][state / 32] = ballot;
    __syncthreads();
  }
  if (state < 32) {
    const float* last = metric[length & 1];
    int best = state;
    for (int s = state + 32; s < kStates; s += 32) best = last[s] < last[best] ? s : best;
    float least = last[best];
    PGOLF_UNROLL
    for (int offset = 16; offset > 0; offset /= 2) {
      const float other = __shfl_down_sync(0xffffffffu, least, offset);
      const int at = __shfl_down_sync(0xffffffffu, best, offset);
      if (other < least) {
        least = other;
        best = at;
      }
    }
    if (state == 0) {
      for (int t = length - 1; t >= 0; --t) {
        const uint32_t bit = decided[t][best / 32] >> (best % 32) & 1;
        path[t] = static_cast<uint16_t>(static_cast<uint32_t>(best) | bit << 8);
        best = (best >> 1) + (bit != 0 ? kHalf : 0);
      }
    }
  }
  __syncthreads();
  for (int t = state; t < length; t += kStates) {
    const int step = path[t];
    const float r = static_cast<float>(residue_into(step % kStates) ^ (step / kStates * 2));
    value[first + t] = 0.5f * (r + 4.0f * rintf(0.25f * (target[t] - r))) - 0.25f;
  }
}

// One thread per chain: neighbours read neighbouring columns.
__global__ void __launch_bounds__(kStates) trellis_values(const int8_t* codes, float* value, int64_t total,
                                                          int64_t chains, int64_t rows, int64_t columns) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kStates + threadIdx.x;
  if (i >= total) return;
  const int64_t column = i % columns, chain = i / columns % chains, matrix = i / columns / chains;
  const int64_t from = chain * kTrellisChain, to = min(rows, from + kTrellisChain);
  uint32_t state = 0;
  for (int64_t row = from; row < to; ++row) {
    const int64_t at = (matrix * rows + row) * columns + column;
    const int code = codes[at];
    value[at] = trellis_value(code, state);
    state = trellis_next(code, state);
  }
}

}  // namespace

void trellis_round_cuda(const float* x, float* value, int64_t rows, int64_t n, CUstream_st* stream) {
  if (rows == 0 || n == 0) return;
  const int64_t chains = (n + kTrellisChain - 1) / kTrellisChain;
  trellis_round<<<grid_blocks(rows * chains, 1, "trellis_round"), kStates, 0, stream>>>(x, value, n, chains);
  PGOLF_LAUNCH_CHECK();
}

void trellis_values_cuda(const int8_t* codes, float* value, int64_t count, int64_t rows, int64_t columns,
                         CUstream_st* stream) {
  if (count * rows * columns == 0) return;
  const int64_t chains = (rows + kTrellisChain - 1) / kTrellisChain, total = count * chains * columns;
  trellis_values<<<grid_blocks(total, kStates, "trellis_values"), kStates, 0, stream>>>(
      codes, value, total, chains, rows, columns);
  PGOLF_LAUNCH_CHECK();
}

}  // namespace pgolf
