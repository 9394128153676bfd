// Bindings of the CUDA kernels of stream_mix, which pgolf/ops/stream_mix.py makes an operator of. Elsewhere
// that file computes with torch's own operators.
#include "kernels/stream_mix.h"

#include <vector>

#include "ops/checks.h"

namespace pgolf {

#ifdef PGOLF_WITH_CUDA
namespace {

// Of float32, as the model's norm has it for every dtype.
constexpr float kEps = 1.1920929e-7f;

// Rows of the width of `first`, as the kernels read them, alive until the kernels are queued.
std::vector<Tensor> check_rows(const char* op, const char* name, TensorList tensors, const Tensor& first) {
  std::vector<Tensor> rows;
  for (const Tensor& tensor : tensors) {
    check_tensor(op, name, tensor, first.sizes(), kBFloat16, first);
    rows.push_back(prepared(tensor));
  }
  return rows;
}

StreamMixShape make_shape(const char* op, TensorList streams, const Tensor& coefficients, bool keep,
                          bool norm) {
  PGOLF_CHECK_VALUE(streams.size() > 0 && streams[0].dim() == 2 && coefficients.dim() == 3, op,
                    ": streams must be (T, D) and coefficients (sums, streams, D), got ", streams.size(),
                    " streams and coefficients ", coefficients.sizes());
  const StreamMixShape shape{.tokens = streams[0].size(0),
                             .width = streams[0].size(1),
                             .streams = static_cast<int>(streams.size()),
                             .sums = static_cast<int>(coefficients.size(0)),
                             .keep = keep,
                             .norm = norm};
  PGOLF_CHECK_VALUE(stream_mix_supports(shape), op, ": needs 2 to ", kMixStreams, " streams, 1 to ", kMixSums,
                    " sums, a width that is a multiple of 8 and at most ", kMixMostWidth,
                    ", and an output of the last sum, got ", shape.streams, " streams, ", shape.sums,
                    " sums, width ", shape.width, ", keep ", keep, " and norm ", norm);
  const int64_t sizes[] = {shape.sums, shape.streams, shape.width};
  check_tensor(op, "coefficients", coefficients, sizes, kFloat, streams[0]);
  return shape;
}

// The sums that are outputs, then the norm if it is one.
std::vector<Tensor> forward(TensorList streams, const Tensor& coefficients, bool keep, bool norm) {
  const char* op = "stream_mix";
  const StreamMixShape shape = make_shape(op, streams, coefficients, keep, norm);
  const DeviceGuard guard(streams[0]);
  const std::vector<Tensor> rows = check_rows(op, "each stream", streams, streams[0]);
  const Tensor c = prepared(coefficients);
  StreamMixForward args{};
  args.coefficients = const_pointer<float>(c);
  args.eps = kEps;
  for (size_t i = 0; i < rows.size(); ++i) args.streams[i] = const_pointer<bf16>(rows[i]);
  std::vector<Tensor> outputs;
  const auto output = [&] {
    outputs.push_back(torch::stable::new_empty(streams[0], {shape.tokens, shape.width}));
    return mutable_pointer<bf16>(outputs.back());
  };
  for (int o = 0; o < shape.sums - !keep; ++o) args.sums[o] = output();
  if (norm) args.norm = output();
  stream_mix_cuda(args, shape, current_stream());
  return outputs;
}

// The gradients of the streams, then the partial sums of those of the coefficients.
std::vector<Tensor> backward(TensorList grads, TensorList streams, const Tensor& coefficients, bool keep,
                             bool norm) {
  const char* op = "stream_mix_backward";
  const StreamMixShape shape = make_shape(op, streams, coefficients, keep, norm);
  const int sums = shape.sums - !keep;
  PGOLF_CHECK_VALUE(static_cast<int>(grads.size()) == sums + norm, op, ": needs ", sums + norm,
                    " gradients, one of each output, got ", grads.size());
  const DeviceGuard guard(streams[0]);
  const std::vector<Tensor> rows = check_rows(op, "each stream", streams, streams[0]);
  const std::vector<Tensor> upstream = check_rows(op, "each gradient", grads, streams[0]);
  const Tensor c = prepared(coefficients);
  StreamMixBackward args{};
  args.coefficients = const_pointer<float>(c);
  args.eps = kEps;
  for (int o = 0; o < sums; ++o) args.grads[o] = const_pointer<bf16>(upstream[static_cast<size_t>(o)]);
  if (norm) args.grad_norm = const_pointer<bf16>(upstream.back());
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < rows.size(); ++i) {
    args.streams[i] = const_pointer<bf16>(rows[i]);
    outputs.push_back(torch::stable::new_empty(streams[0], {shape.tokens, shape.width}));
    args.stream_grads[i] = mutable_pointer<bf16>(outputs.back());
  }
  outputs.push_back(
      torch::stable::new_empty(coefficients, {kMixPartials, shape.sums, shape.streams, shape.width}));
  args.partials = mutable_pointer<float>(outputs.back());
  stream_mix_backward_cuda(args, shape, current_stream());
  return outputs;
}

}  // namespace
#endif
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("stream_mix(Tensor[] streams, Tensor coefficients, bool keep, bool norm) -> Tensor[]");
  m.def(
      "stream_mix_backward(Tensor[] grads, Tensor[] streams, Tensor coefficients, bool keep, bool norm) -> "
      "Tensor[]");
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("stream_mix", TORCH_BOX(&pgolf::forward));
  m.impl("stream_mix_backward", TORCH_BOX(&pgolf::backward));
}
#endif
