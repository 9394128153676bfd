// CUDA kernels of adam_step.h: bound by memory, 16 bytes at a time, every tensor read and written once.
#include "kernels/adam_apply.cuh"
#include "kernels/reduce.cuh"

namespace pgolf {
namespace {

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

template <typename Target>
void adam_step_cuda(const Target* targets, int count, AdamRule rule, CUstream_st* stream) {
  launch_adam(targets, count, rule, [&](const AdamArgs<Target>& args, unsigned int blocks) {
    adam_step_kernel<<<blocks, kAdamThreads, 0, stream>>>(args);
    PGOLF_LAUNCH_CHECK();
  });
}

template void square_sums_cuda<float>(const SquareSum*, int, float*, void*, CUstream_st*);
template void square_sums_cuda<bf16>(const SquareSum*, int, float*, void*, CUstream_st*);
template void adam_step_cuda(const AdamTarget*, int, AdamRule, CUstream_st*);
template void adam_step_cuda(const Ahead<AdamTarget>*, int, AdamRule, CUstream_st*);

}  // namespace pgolf
