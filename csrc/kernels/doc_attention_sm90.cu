// Launchers of doc_attention.h on Hopper.
#include <cuda.h>

#include "kernels/doc_attention_backward_sm90.cuh"
#include "kernels/doc_attention_parts.cuh"
#include "kernels/tensor_map.cuh"

namespace pgolf {
namespace {

using attention::kTile;
using attention::kWidth;

// Of (tokens, heads, 64): a box is 128 tokens of a head.
CUtensorMap head_map(const bf16* first, int64_t tokens, int heads, int64_t stride) {
  return tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, first,
                    {.rank = 3,
                     .sizes = {kWidth, static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(tokens)},
                     .strides = {kWidth * 2, static_cast<cuuint64_t>(stride) * 2},
                     .box = {kWidth, 1, kTile}});
}

}  // namespace

bool doc_attention_backward_supports(const DocAttentionShape& shape) {
  constexpr int64_t kMaxTokens = int64_t{1} << 30;
  return shape.groups > 0 && shape.heads % shape.groups == 0 && shape.tokens <= kMaxTokens &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

void doc_attention_backward_sm90(const DocAttentionBackward& args, const DocAttentionShape& shape,
                                 CUstream_st* stream) {
  if (shape.tokens == 0) return;
  const int64_t rows = shape.tokens * shape.heads;
  PGOLF_CUDA_CHECK(cudaMemsetAsync(args.dq_sum, 0, static_cast<size_t>(rows) * kWidth * 4, stream));
  attention::plan_kernel<<<1, attention::kPlanThreads, 0, stream>>>(args.documents, shape.segments,
                                                                    args.plan);
  PGOLF_LAUNCH_CHECK();
  const dim3 grid =
      head_grid(attention::delta_kernel, shape.tokens, stripe_count(int64_t{shape.heads} * kWidth, 1));
  attention::delta_kernel<<<grid, kHeadThreads, 0, stream>>>(args.grad, args.grad_stride, args.y, args.delta,
                                                             shape.tokens, shape.heads);
  PGOLF_LAUNCH_CHECK();

  const attention::BackwardArgs own{.plan = args.plan,
                                    .lse = args.lse,
                                    .delta = args.delta,
                                    .dq_sum = args.dq_sum,
                                    .dk = args.dk,
                                    .dv = args.dv,
                                    .tokens = static_cast<int>(shape.tokens),
                                    .groups = shape.groups,
                                    .ratio = shape.heads / shape.groups,
                                    .scale = shape.scale};
  // One block per multiprocessor, as its shared memory allows no second one.
  const int64_t most = doc_attention_max_tiles(shape) * shape.groups;
  const int blocks = static_cast<int>(std::min(most, int64_t{multiprocessor_count()}));
  PGOLF_CUDA_CHECK(cudaFuncSetAttribute(
      attention::backward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, attention::kSharedBytes));
  attention::backward_kernel<<<blocks, attention::kThreads, attention::kSharedBytes, stream>>>(
      head_map(args.q, shape.tokens, shape.heads, args.q_stride),
      head_map(args.k, shape.tokens, shape.groups, args.k_stride),
      head_map(args.v, shape.tokens, shape.groups, args.v_stride),
      head_map(args.grad, shape.tokens, shape.heads, args.grad_stride), own);
  PGOLF_LAUNCH_CHECK();

  const int64_t threads = rows * (kWidth / kVector);
  const auto dq_blocks = static_cast<unsigned int>(
      std::min((threads + kHeadThreads - 1) / kHeadThreads, int64_t{multiprocessor_count()} * 8));
  attention::dq_kernel<<<dq_blocks, kHeadThreads, 0, stream>>>(args.dq_sum, args.dq, shape.tokens,
                                                               shape.heads, shape.scale);
  PGOLF_LAUNCH_CHECK();
}

}  // namespace pgolf
