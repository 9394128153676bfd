// Launchers of stream_mix's kernels for sm_80 and newer.
#include <algorithm>

#include "kernels/stream_mix.cuh"

namespace pgolf {
namespace {

// Calls launch(Streams, Sums, Norm) as compile-time constants.
template <typename Launch>
void with_sizes(const StreamMixShape& shape, const Launch& launch) {
  if (!stream_mix_supports(shape)) throw std::runtime_error("stream_mix: no kernel for this shape");
  const auto with_norm = [&](auto streams, auto sums) {
    if (shape.norm) {
      launch(streams, sums, std::true_type{});
    } else {
      launch(streams, sums, std::false_type{});
    }
  };
  const auto with_sums = [&](auto streams) {
    if (shape.sums == 1) {
      with_norm(streams, std::integral_constant<int, 1>{});
    } else {
      with_norm(streams, std::integral_constant<int, 2>{});
    }
  };
  if (shape.streams == 2) {
    with_sums(std::integral_constant<int, 2>{});
  } else if (shape.streams == 3) {
    with_sums(std::integral_constant<int, 3>{});
  } else {
    with_sums(std::integral_constant<int, 4>{});
  }
}

}  // namespace

void stream_mix_cuda(const StreamMixForward& args, const StreamMixShape& shape, CUstream_st* stream) {
  if (shape.tokens == 0) return;
  // Few enough to be resident together: a block reads the coefficients once for all of its tokens.
  const int64_t tokens = mix_tokens(shape.width), most = int64_t{4} * multiprocessor_count();
  const auto blocks = static_cast<unsigned int>(std::min((shape.tokens + tokens - 1) / tokens, most));
  with_sizes(shape, [&](auto streams, auto sums, auto norm) {
    mix_kernel<streams, sums, norm><<<blocks, kMixThreads, 0, stream>>>(args, shape.tokens, shape.width);
    PGOLF_LAUNCH_CHECK();
  });
}

void stream_mix_backward_cuda(const StreamMixBackward& args, const StreamMixShape& shape,
                              CUstream_st* stream) {
  // Also without tokens: blocks that have none write the zeros of their partials.
  with_sizes(shape, [&](auto streams, auto sums, auto norm) {
    mix_backward_kernel<streams, sums, norm>
        <<<kMixPartials, kMixThreads, 0, stream>>>(args, shape.tokens, shape.width);
    PGOLF_LAUNCH_CHECK();
  });
}

}  // namespace pgolf
