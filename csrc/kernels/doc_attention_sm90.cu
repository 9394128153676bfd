// Launchers of doc_attention.h on Hopper.
#include <cuda.h>

#include "kernels/doc_attention_backward_sm90.cuh"
#include "kernels/doc_attention_forward_sm90.cuh"
#include "kernels/doc_attention_parts.cuh"
#include "kernels/tensor_map.cuh"

namespace pgolf {
namespace {

using attention::head_map;
using attention::kWidth;

// The list of tiles of `size` tokens, and zeros for as many flags.
void plan(const int32_t* documents, const DocAttentionShape& shape, int size, DocTile* plan, uint32_t* flag,
          int64_t flags, CUstream_st* stream) {
  launch_kernel(attention::plan_kernel, {.blocks = 1, .threads = attention::kPlanThreads}, stream, documents,
                shape.segments, size, plan, flag, flags);
}

Grid piece_grid(const DocAttentionShape& shape) {
  const int64_t pieces = shape.tokens * shape.heads * attention::kPieces, most = 8 * multiprocessor_count();
  return {.blocks = static_cast<unsigned int>(std::min((pieces + kHeadThreads - 1) / kHeadThreads, most)),
          .threads = kHeadThreads};
}

template <typename Kernel, typename... Arguments>
void launch(Kernel* kernel, unsigned int threads, int shared, const DocAttentionShape& shape, int tile,
            CUstream_st* stream, const Arguments&... arguments) {
  // One block per multiprocessor, as its shared memory allows no second one.
  const int64_t most = doc_attention_max_tiles(shape, tile) * shape.groups;
  const auto blocks = static_cast<unsigned int>(std::min(most, int64_t{multiprocessor_count()}));
  PGOLF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  launch_kernel(kernel, {.blocks = blocks, .threads = threads, .shared = static_cast<size_t>(shared)}, stream,
                arguments...);
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
  plan(args.documents, shape, queries, args.plan, nullptr, 0, stream);
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
  plan(args.documents, shape, kDocKeys, args.plan, args.filled, doc_attention_flags(shape), stream);
  if (args.y != nullptr) {
    launch_kernel(attention::delta_kernel, piece_grid(shape), stream, args.grad, args.grad_stride, args.y,
                  args.delta, shape.tokens, shape.heads);
  }
  const attention::backward::Args own{.plan = args.plan,
                                      .lse = args.lse,
                                      .delta = args.delta,
                                      .filled = args.filled,
                                      .dq = args.dq,
                                      .dk = args.dk,
                                      .dv = args.dv,
                                      .tokens = static_cast<int>(shape.tokens),
                                      .groups = shape.groups,
                                      .ratio = shape.heads / shape.groups,
                                      .scale = shape.scale};
  launch(
      attention::backward::kernel, attention::backward::kThreads, attention::backward::kSharedBytes, shape,
      kDocKeys, stream, head_map(args.q, shape.tokens, shape.heads, args.q_stride, kDocKeys),
      head_map(args.k, shape.tokens, shape.groups, args.k_stride, kDocKeys),
      head_map(args.v, shape.tokens, shape.groups, args.v_stride, kDocKeys),
      head_map(args.grad, shape.tokens, shape.heads, args.grad_stride, kDocKeys),
      head_map(args.dq, shape.tokens, shape.heads, int64_t{shape.heads} * kWidth, attention::backward::kRows),
      own);
}

}  // namespace pgolf
