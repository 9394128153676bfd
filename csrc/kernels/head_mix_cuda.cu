// Launchers of head_mix's kernels for sm_80 and newer.
#include "kernels/head_mix.cuh"

namespace pgolf {
namespace {

// Calls launch(Width, Ratio) as compile-time constants.
template <typename Launch>
void with_sizes(const HeadMixShape& shape, const Launch& launch) {
  if (!head_mix_supports(shape)) throw std::runtime_error("head_mix: no kernel for this shape");
  if (shape.tokens == 0) return;
  const int ratio = shape.heads / shape.groups;
  const auto with_ratio = [&](auto width) {
    if (ratio == 1) {
      launch(width, std::integral_constant<int, 1>{});
    } else if (ratio == 2) {
      launch(width, std::integral_constant<int, 2>{});
    } else {
      launch(width, std::integral_constant<int, 4>{});
    }
  };
  if (shape.width == 64) {
    with_ratio(std::integral_constant<int, 64>{});
  } else {
    with_ratio(std::integral_constant<int, 128>{});
  }
}

// Blocks that share a token.
unsigned int mix_parts(const HeadMixShape& shape) {
  return stripe_count(int64_t{shape.groups} * shape.width, 1);
}

}  // namespace

void head_mix_cuda(const HeadMixForward& args, const HeadMixShape& shape, CUstream_st* stream) {
  with_sizes(shape, [&](auto width, auto ratio) {
    const auto kernel = &head_mix_kernel<width, ratio>;
    const dim3 grid = head_grid(kernel, shape.tokens, mix_parts(shape));
    kernel<<<grid, kHeadThreads, 0, stream>>>(args, shape);
    PGOLF_LAUNCH_CHECK();
  });
}

void head_mix_backward_cuda(const HeadMixBackward& args, const HeadMixShape& shape, CUstream_st* stream) {
  with_sizes(shape, [&](auto width, auto ratio) {
    const auto kernel = &head_mix_backward_kernel<width, ratio>;
    const dim3 grid = head_grid(kernel, shape.tokens, mix_parts(shape));
    kernel<<<grid, kHeadThreads, 0, stream>>>(args, shape);
    PGOLF_LAUNCH_CHECK();
  });
}

}  // namespace pgolf
