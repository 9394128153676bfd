// Binding of int6: schema, checks, allocation, dispatch. Bit layout: kernels/int6.h.
#include "kernels/int6.h"

#include <limits>
#include <tuple>
#include <vector>

#include "ops/checks.h"

namespace pgolf {
namespace {

// `(..., n)` as rows of its last dimension.
struct Rows {
  int64_t rows;
  int64_t n;
  std::vector<int64_t> sizes;  // of the output
};

Rows check_codes(const Tensor& codes) {
  PGOLF_CHECK_TYPE(codes.scalar_type() == kChar, "pack_int6: codes must be int8, got ", codes.scalar_type());
  PGOLF_CHECK_VALUE(codes.dim() >= 1, "pack_int6: codes must be (..., n) with at least one dimension, got ",
                    codes.sizes());
  Rows result{1, codes.size(-1), codes.sizes().vec()};
  for (int64_t i = 0; i + 1 < codes.dim(); ++i) result.rows *= codes.size(i);
  result.sizes.back() = int6_row_bytes(result.n);
  return result;
}

Rows check_packed(const Tensor& packed, int64_t n) {
  PGOLF_CHECK_TYPE(packed.scalar_type() == kByte, "unpack_int6: packed must be uint8, got ",
                   packed.scalar_type());
  PGOLF_CHECK_VALUE(n >= 0, "unpack_int6: n must be >= 0, got ", n);
  PGOLF_CHECK_VALUE(packed.dim() >= 1 && packed.size(-1) == int6_row_bytes(n),
                    "unpack_int6: packed must be (..., 3 * ceil(n / 4))=(..., ", int6_row_bytes(n),
                    ") for n=", n, ", got ", packed.sizes());
  Rows result{1, n, packed.sizes().vec()};
  for (int64_t i = 0; i + 1 < packed.dim(); ++i) result.rows *= packed.size(i);
  result.sizes.back() = n;
  return result;
}

Tensor pack_cpu(const Tensor& codes) {
  const Rows shape = check_codes(codes);
  const Tensor in = torch::stable::contiguous(codes);
  const int8_t* data = const_pointer<int8_t>(in);
  const int64_t bad = int6_first_bad_code(data, in.numel());
  PGOLF_CHECK_VALUE(bad < 0, "pack_int6: codes must be in [-32, 31], got ", static_cast<int>(data[bad]),
                    " at flat index ", bad, "; clamp before packing");
  Tensor out = torch::stable::new_empty(in, shape.sizes, kByte);
  pack_int6_cpu(data, mutable_pointer<uint8_t>(out), shape.rows, shape.n, num_threads());
  return out;
}

Tensor unpack_cpu(const Tensor& packed, int64_t n) {
  const Rows shape = check_packed(packed, n);
  const Tensor in = torch::stable::contiguous(packed);
  Tensor out = torch::stable::new_empty(in, shape.sizes, kChar);
  unpack_int6_cpu(const_pointer<uint8_t>(in), mutable_pointer<int8_t>(out), shape.rows, shape.n,
                  num_threads());
  return out;
}

#ifdef PGOLF_WITH_CUDA
Tensor pack_cuda(const Tensor& codes) {
  const Rows shape = check_codes(codes);
  const DeviceGuard guard(codes);
  const Tensor in = torch::stable::contiguous(codes);
  Tensor out = torch::stable::new_empty(in, shape.sizes, kByte);
  pack_int6_cuda(const_pointer<int8_t>(in), mutable_pointer<uint8_t>(out), shape.rows, shape.n,
                 current_stream());
  return out;
}

Tensor unpack_cuda(const Tensor& packed, int64_t n) {
  const Rows shape = check_packed(packed, n);
  const DeviceGuard guard(packed);
  const Tensor in = torch::stable::contiguous(packed);
  Tensor out = torch::stable::new_empty(in, shape.sizes, kChar);
  unpack_int6_cuda(const_pointer<uint8_t>(in), mutable_pointer<int8_t>(out), shape.rows, shape.n,
                   current_stream());
  return out;
}
#endif

void check_bits(const char* op, int64_t bits) {
  PGOLF_CHECK_VALUE(bits >= 4 && bits <= 8, op, ": bits must be one of (4, 5, 6, 7, 8), got ", bits);
}

void check_scales(const char* op, const Tensor& scales, const Tensor& rows_of) {
  PGOLF_CHECK_TYPE(scales.scalar_type() == kHalf, op, ": scales must be float16, got ", scales.scalar_type());
  PGOLF_CHECK_VALUE(same(scales.sizes(), rows_of.sizes().slice(0, rows_of.dim() - 1)), op,
                    ": scales must have one step a row ", rows_of.sizes().slice(0, rows_of.dim() - 1),
                    ", got ", scales.sizes());
  PGOLF_CHECK_VALUE(scales.device() == rows_of.device(), op, ": scales must be on ", rows_of.device(),
                    ", got ", scales.device());
}

Rows check_weight(const char* op, const Tensor& weight, int64_t bits) {
  PGOLF_CHECK_TYPE(weight.scalar_type() == kFloat, op, ": weight must be float32, got ",
                   weight.scalar_type());
  PGOLF_CHECK_VALUE(weight.dim() >= 1, op, ": weight must be (..., n) with at least one dimension, got ",
                    weight.sizes());
  check_bits(op, bits);
  Rows result{1, weight.size(-1), weight.sizes().vec()};
  for (int64_t i = 0; i + 1 < weight.dim(); ++i) result.rows *= weight.size(i);
  result.sizes.back() = packed_row_bytes(result.n, static_cast<int>(bits));
  return result;
}

// Either device's quantize_pack: `scales` are given, or with clip > 0 computed into it.
Tensor quantize_into(const char* op, const Tensor& weight, const Tensor& scales, int64_t bits, double clip) {
  const Rows shape = check_weight(op, weight, bits);
  check_scales(op, scales, weight);
  const Tensor in = torch::stable::contiguous(weight);
  Tensor out = torch::stable::new_empty(in, shape.sizes, kByte);
  f16* steps = static_cast<f16*>(scales.data_ptr());  // read only when clip == 0
#ifdef PGOLF_WITH_CUDA
  if (weight.is_cuda()) {
    const DeviceGuard guard(weight);
    quantize_pack_cuda(const_pointer<float>(in), steps, mutable_pointer<uint8_t>(out), shape.rows, shape.n,
                       static_cast<int>(bits), static_cast<float>(clip), current_stream());
    return out;
  }
#endif
  quantize_pack_cpu(const_pointer<float>(in), steps, mutable_pointer<uint8_t>(out), shape.rows, shape.n,
                    static_cast<int>(bits), static_cast<float>(clip), num_threads());
  return out;
}

Tensor quantize_pack(const Tensor& weight, const Tensor& scales, int64_t bits) {
  return quantize_into("quantize_pack", weight, torch::stable::contiguous(scales), bits, 0.0);
}

std::tuple<Tensor, Tensor> quantize_pack_sdclip(const Tensor& weight, double clip, int64_t bits) {
  const Rows shape = check_weight("quantize_pack_sdclip", weight, bits);
  // As a float32: the kernels take 0 for "the steps are given", and infinity times no deviation is NaN.
  PGOLF_CHECK_VALUE(clip >= std::numeric_limits<float>::min() && clip <= std::numeric_limits<float>::max(),
                    "quantize_pack_sdclip: clip must be > 0 standard deviations and fit float32, got ", clip);
  PGOLF_CHECK_VALUE(shape.n >= 2 && shape.n <= (1 << 20),
                    "quantize_pack_sdclip: rows must have 2 to 2^20 columns (a deviation needs two), got ",
                    shape.n);
  Tensor scales = torch::stable::new_empty(weight, weight.sizes().slice(0, weight.dim() - 1), kHalf);
  Tensor packed = quantize_into("quantize_pack_sdclip", weight, scales, bits, clip);
  return {packed, scales};
}

Tensor unpack_dequantize(const Tensor& packed, const Tensor& scales, int64_t n, int64_t bits) {
  PGOLF_CHECK_TYPE(packed.scalar_type() == kByte, "unpack_dequantize: packed must be uint8, got ",
                   packed.scalar_type());
  check_bits("unpack_dequantize", bits);
  PGOLF_CHECK_VALUE(n >= 0, "unpack_dequantize: n must be >= 0, got ", n);
  const int64_t row_bytes = packed_row_bytes(n, static_cast<int>(bits));
  PGOLF_CHECK_VALUE(packed.dim() >= 1 && packed.size(-1) == row_bytes,
                    "unpack_dequantize: packed must be (..., ", row_bytes, ") for n=", n, " of ", bits,
                    " bits, got ", packed.sizes());
  check_scales("unpack_dequantize", scales, packed);
  const Tensor in = torch::stable::contiguous(packed), steps = torch::stable::contiguous(scales);
  std::vector<int64_t> sizes = packed.sizes().vec();
  sizes.back() = n;
  Tensor out = torch::stable::new_empty(in, sizes, kBFloat16);
#ifdef PGOLF_WITH_CUDA
  if (packed.is_cuda()) {
    const DeviceGuard guard(packed);
    unpack_dequantize_cuda(const_pointer<uint8_t>(in), const_pointer<f16>(steps), mutable_pointer<bf16>(out),
                           steps.numel(), n, static_cast<int>(bits), current_stream());
    return out;
  }
#endif
  unpack_dequantize_cpu(const_pointer<uint8_t>(in), const_pointer<f16>(steps), mutable_pointer<bf16>(out),
                        steps.numel(), n, static_cast<int>(bits), num_threads());
  return out;
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("pack_int6(Tensor codes) -> Tensor");
  m.def("unpack_int6(Tensor packed, SymInt n) -> Tensor");
  m.def("quantize_pack(Tensor weight, Tensor scales, int bits) -> Tensor");
  m.def("quantize_pack_sdclip(Tensor weight, float clip, int bits) -> (Tensor, Tensor)");
  m.def("unpack_dequantize(Tensor packed, Tensor scales, SymInt n, int bits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("pack_int6", TORCH_BOX(&pgolf::pack_cpu));
  m.impl("unpack_int6", TORCH_BOX(&pgolf::unpack_cpu));
  m.impl("quantize_pack", TORCH_BOX(&pgolf::quantize_pack));
  m.impl("quantize_pack_sdclip", TORCH_BOX(&pgolf::quantize_pack_sdclip));
  m.impl("unpack_dequantize", TORCH_BOX(&pgolf::unpack_dequantize));
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("pack_int6", TORCH_BOX(&pgolf::pack_cuda));
  m.impl("unpack_int6", TORCH_BOX(&pgolf::unpack_cuda));
  m.impl("quantize_pack", TORCH_BOX(&pgolf::quantize_pack));
  m.impl("quantize_pack_sdclip", TORCH_BOX(&pgolf::quantize_pack_sdclip));
  m.impl("unpack_dequantize", TORCH_BOX(&pgolf::unpack_dequantize));
}
#endif
