// CUDA kernels of adam_step.h: bound by memory, 16 bytes at a time, every tensor read and written once.
#include "kernels/adam_step.h"
#include "kernels/reduce.cuh"
#include "kernels/vector8.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kRun = kThreads * kVector;  // elements of a block in adam_step
constexpr int kMaxTargets = 56;
constexpr int kSumThreads = 512;
constexpr int kSumUnroll = 2;                                    // vectors of a thread in square_sums
constexpr int64_t kSumRun = kSumThreads * kVector * kSumUnroll;  // elements of a partial sum, on any GPU
constexpr int kMaxSums = 64;

// An empty tensor has a sum too.
int64_t sum_blocks(const SquareSum& tensor) {
  return std::max<int64_t>((tensor.count + kSumRun - 1) / kSumRun, 1);
}

// ---- square_sums: one partial sum per block; the last block of a tensor to finish adds them in order

struct SumArgs {
  Runs<SquareSum, kMaxSums> runs;
  unsigned int blocks;
  float* out;
  unsigned int* counters;  // (tensors,), zero
  float* partial;          // (blocks,)
};
static_assert(sizeof(SumArgs) <= 4096, "kernel arguments hold 4 KB on every driver");

template <typename T>
__global__ void __launch_bounds__(kSumThreads) square_sums_kernel(const __grid_constant__ SumArgs args) {
  __shared__ float staged[kSumThreads / kWarp], staged_last[kSumThreads / kWarp];
  __shared__ bool last;
  const int which = args.runs.of_block(blockIdx.x);
  const SquareSum& tensor = args.runs.targets[which];
  const T* data = static_cast<const T*>(tensor.data);
  const unsigned int first = args.runs.first[which];
  const unsigned int end = which + 1 < args.runs.count ? args.runs.first[which + 1] : args.blocks;
  const int64_t begin = (blockIdx.x - first) * kSumRun + threadIdx.x * kVector;
  float sum = 0.0f;
  PGOLF_UNROLL
  for (int k = 0; k < kSumUnroll; ++k) {
    const int64_t at = begin + k * kSumThreads * kVector, valid = tensor.count - at;
    if (valid <= 0) break;
    float value[kVector];
    load8(value, data + at, valid, args.runs.aligned[which] && valid >= kVector);
    PGOLF_UNROLL
    for (int i = 0; i < kVector; ++i) sum = fmaf(value[i], value[i], sum);
  }
  sum = block_sum<kSumThreads>(sum, staged);
  if (threadIdx.x == 0) {
    args.partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(args.counters + which, 1u) == end - first - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  float total = 0.0f;
  for (unsigned int i = first + threadIdx.x; i < end; i += kSumThreads) total += __ldcg(args.partial + i);
  total = block_sum<kSumThreads>(total, staged_last);
  if (threadIdx.x == 0) args.out[which] = total;
}

__global__ void clip_scale_kernel(const float* sums, int count, float* state, float* hyper,
                                  float* corrections, ClipRule rule) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += sums[i];
  const float norm = sqrtf(sum);
  const bool finite = isfinite(norm);
  const float scale = rule.clip > 0 ? fminf(static_cast<float>(rule.clip) / (norm + kClipEps), 1.0f) : 1.0f;
  hyper[kHyperGradScale] = finite ? scale : __int_as_float(0x7fffffff);  // NaN
  state[kClipNorm] = norm;
  state[finite ? kClipSteps : kClipSkipped] += 1.0f;
  const double steps = fmaxf(state[kClipSteps], 1.0f);
  corrections[0] = static_cast<float>(1.0 / (1.0 - pow(rule.beta1, steps)));
  corrections[1] = static_cast<float>(1.0 / (1.0 - pow(rule.beta2, steps)));
}

// ---- adam_step: one run of elements per block

struct AdamArgs {
  Runs<AdamTarget, kMaxTargets> runs;
  AdamRule rule;
};
static_assert(sizeof(AdamArgs) <= 4096, "kernel arguments hold 4 KB on every driver");

__global__ void __launch_bounds__(kThreads) adam_step_kernel(const __grid_constant__ AdamArgs args) {
  const int which = args.runs.of_block(blockIdx.x);
  const AdamTarget& t = args.runs.targets[which];
  const int64_t at = (blockIdx.x - args.runs.first[which]) * kRun + threadIdx.x * kVector;
  const int64_t valid = t.count - at;
  if (valid <= 0) return;
  const bool aligned = args.runs.aligned[which] && valid >= kVector;
  const AdamRule& rule = args.rule;
  const float scale = rule.hyper[kHyperGradScale], weight = rule.hyper[kHyperAverageWeight];
  if (!isfinite(scale)) {
    zero8(t.grad + at, valid, aligned);
    return;
  }
  float p[kVector], g[kVector], m[kVector], v[kVector], average[kVector];
  load8(g, t.grad + at, valid, aligned);
  load8(m, t.mean + at, valid, aligned);
  load8(v, t.square + at, valid, aligned);
  load8(p, t.param + at, valid, aligned);
  if (t.average != nullptr) load8(average, t.average + at, valid, aligned);
  const float lr = *rule.lr;
  const float keep = 1.0f - lr * rule.weight_decay, step = lr * rule.corrections[0];
  const float correction = rule.corrections[1];
  PGOLF_UNROLL
  for (int i = 0; i < kVector; ++i) {
    g[i] *= scale;
    m[i] = fmaf(rule.beta1, m[i], rule.rest1 * g[i]);
    v[i] = fmaf(rule.beta2, v[i], rule.rest2 * g[i] * g[i]);
    p[i] = fmaf(p[i], keep, -step * m[i] / (sqrtf(correction * v[i]) + rule.eps));
  }
  zero8(t.grad + at, valid, aligned);
  store8<true>(t.mean + at, m, valid, aligned);
  store8<true>(t.square + at, v, valid, aligned);
  store8<true>(t.param + at, p, valid, aligned);
  if (t.average == nullptr) return;
  lerp8(average, p, weight);
  store8<true>(t.average + at, average, valid, aligned);
}

}  // namespace

int64_t square_sums_workspace(const SquareSum* tensors, int count) {
  int64_t places = count;
  for (int i = 0; i < count; ++i) places += sum_blocks(tensors[i]);
  return places * static_cast<int64_t>(sizeof(float));
}

template <typename T>
void square_sums_cuda(const SquareSum* tensors, int count, float* out, void* workspace, CUstream_st* stream) {
  auto* counters = static_cast<unsigned int*>(workspace);
  auto* partial = reinterpret_cast<float*>(counters + count);
  launch_runs<kMaxSums>(
      tensors, count, "square_sums", sum_blocks, [](const SquareSum& t) { return aligned16(t.data); },
      [&](const Runs<SquareSum, kMaxSums>& runs, unsigned int blocks) {
        square_sums_kernel<typename DeviceType<T>::type><<<blocks, kSumThreads, 0, stream>>>(
            SumArgs{.runs = runs, .blocks = blocks, .out = out, .counters = counters, .partial = partial});
        PGOLF_LAUNCH_CHECK();
        out += runs.count;
        counters += runs.count;
        partial += blocks;
      });
}

void clip_scale_cuda(const float* sums, int count, float* state, float* hyper, float* corrections,
                     ClipRule rule, CUstream_st* stream) {
  clip_scale_kernel<<<1, 1, 0, stream>>>(sums, count, state, hyper, corrections, rule);
  PGOLF_LAUNCH_CHECK();
}

void adam_step_cuda(const AdamTarget* targets, int count, AdamRule rule, CUstream_st* stream) {
  launch_runs<kMaxTargets>(
      targets, count, "adam_step", [](const AdamTarget& t) { return (t.count + kRun - 1) / kRun; },
      [](const AdamTarget& t) {
        return aligned16(t.param) && aligned16(t.grad) && aligned16(t.mean) && aligned16(t.square) &&
               aligned16(t.average);
      },
      [&](const Runs<AdamTarget, kMaxTargets>& runs, unsigned int blocks) {
        adam_step_kernel<<<blocks, kThreads, 0, stream>>>(AdamArgs{runs, rule});
        PGOLF_LAUNCH_CHECK();
      });
}

template void square_sums_cuda<float>(const SquareSum*, int, float*, void*, CUstream_st*);
template void square_sums_cuda<bf16>(const SquareSum*, int, float*, void*, CUstream_st*);

}  // namespace pgolf
