// Launchers of doc_attention.h on Hopper.
#include <cuda.h>

#include "kernels/doc_attention_backward_sm90.cuh"
#include "kernels/doc_attention_forward_sm90.cuh"
#include "kernels/doc_attention_parts.cuh"
#include "kernels/tensor_map.cuh"

namespace pgolf {
namespace {

using attention::kWidth;

// Of (tokens, heads, 64): a box is `box` tokens of a head.
CUtensorMap head_map(const bf16* first, int64_t tokens, int heads, int64_t stride, int box) {
  return tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, first,
                    {.rank = 3,
                     .sizes = {kWidth, static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(tokens)},
                     .strides = {kWidth * 2, static_cast<cuuint64_t>(stride) * 2},
                     .box = {kWidth, 1, static_cast<cuuint32_t>(box)}});
}

// The list of tiles of `size` tokens.
template <bool Backwards>
void plan(const int32_t* documents, const DocAttentionShape& shape, int size, DocTile* plan,
          CUstream_st* stream) {
  attention::plan_kernel<Backwards>
      <<<1, attention::kPlanThreads, 0, stream>>>(documents, shape.segments, size, plan);
  PGOLF_LAUNCH_CHECK();
}

template <typename Kernel, typename... Arguments>
void launch(Kernel* kernel, int threads, int shared, const DocAttentionShape& shape, int tile,
            CUstream_st* stream, const Arguments&... arguments) {
  // One block per multiprocessor, as its shared memory allows no second one.
  const int64_t most = doc_attention_max_tiles(shape, tile) * shape.groups;
  const int blocks = static_cast<int>(std::min(most, int64_t{multiprocessor_count()}));
  PGOLF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<blocks, threads, shared, stream>>>(arguments...);
  PGOLF_LAUNCH_CHECK();
}

}  // namespace

bool doc_attention_supports(const DocAttentionShape& shape) {
  constexpr int64_t kMaxTokens = int64_t{1} << 30;
  if (shape.groups <= 0 || shape.heads % shape.groups != 0 || shape.tokens > kMaxTokens) return false;
  const int ratio = shape.heads / shape.groups;
  return (ratio == 1 || ratio == 2 || ratio == 4) && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
}

void doc_attention_sm90(const DocAttentionForward& args, const DocAttentionShape& shape,
                        CUstream_st* stream) {
  if (shape.tokens == 0) return;
  const int ratio = shape.heads / shape.groups, queries = doc_attention_queries(ratio);
  plan<true>(args.documents, shape, queries, args.plan, stream);
  const attention::forward::Args own{.plan = args.plan,
                                     .y = args.y,
                                     .lse = args.lse,
                                     .tokens = static_cast<int>(shape.tokens),
                                     .groups = shape.groups,
                                     .ratio = ratio,
                                     .scale = shape.scale};
  launch(attention::forward::kernel, attention::forward::kThreads, attention::forward::kSharedBytes, shape,
         queries, stream,
         head_map(args.q, shape.tokens, shape.heads, args.q_stride, attention::forward::kRows / ratio),
         head_map(args.k, shape.tokens, shape.groups, args.k_stride, attention::forward::kKeys),
         head_map(args.v, shape.tokens, shape.groups, args.v_stride, attention::forward::kKeys), own);
}

void doc_attention_backward_sm90(const DocAttentionBackward& args, const DocAttentionShape& shape,
                                 CUstream_st* stream) {
  if (shape.tokens == 0) return;
  const int64_t rows = shape.tokens * shape.heads;
  PGOLF_CUDA_CHECK(cudaMemsetAsync(args.dq_sum, 0, static_cast<size_t>(rows) * kWidth * 4, stream));
  plan<false>(args.documents, shape, kDocKeys, args.plan, stream);
  const dim3 grid =
      head_grid(attention::delta_kernel, shape.tokens, stripe_count(int64_t{shape.heads} * kWidth, 1));
  attention::delta_kernel<<<grid, kHeadThreads, 0, stream>>>(args.grad, args.grad_stride, args.y, args.delta,
                                                             shape.tokens, shape.heads);
  PGOLF_LAUNCH_CHECK();

  const attention::backward::Args own{.plan = args.plan,
                                      .lse = args.lse,
                                      .delta = args.delta,
                                      .dq_sum = args.dq_sum,
                                      .dk = args.dk,
                                      .dv = args.dv,
                                      .tokens = static_cast<int>(shape.tokens),
                                      .groups = shape.groups,
                                      .ratio = shape.heads / shape.groups,
                                      .scale = shape.scale};
  launch(attention::backward::kernel, attention::backward::kThreads, attention::backward::kSharedBytes, shape,
         kDocKeys, stream, head_map(args.q, shape.tokens, shape.heads, args.q_stride, kDocKeys),
         head_map(args.k, shape.tokens, shape.groups, args.k_stride, kDocKeys),
         head_map(args.v, shape.tokens, shape.groups, args.v_stride, kDocKeys),
         head_map(args.grad, shape.tokens, shape.heads, args.grad_stride, kDocKeys), own);

  const int64_t threads = rows * (kWidth / kVector);
  const auto dq_blocks = static_cast<unsigned int>(
      std::min((threads + kHeadThreads - 1) / kHeadThreads, int64_t{multiprocessor_count()} * 8));
  attention::dq_kernel<<<dq_blocks, kHeadThreads, 0, stream>>>(args.dq_sum, args.dq, shape.tokens,
                                                               shape.heads, shape.scale);
  PGOLF_LAUNCH_CHECK();
}

}  // namespace pgolf
