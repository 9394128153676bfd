// Binding of int6: schema, checks, allocation, dispatch. Bit layout: kernels/int6.h.
#include "kernels/int6.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

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

Rows check_codes(const at::Tensor& codes) {
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kChar, "pack_int6: codes must be int8, got ",
                   codes.scalar_type());
  TORCH_CHECK_VALUE(codes.dim() >= 1, "pack_int6: codes must be (..., n) with at least one dimension, got ",
                    codes.sizes());
  Rows result{1, codes.size(-1), codes.sizes().vec()};
  for (int64_t i = 0; i + 1 < codes.dim(); ++i) result.rows *= codes.size(i);
  result.sizes.back() = int6_row_bytes(result.n);
  return result;
}

Rows check_packed(const at::Tensor& packed, int64_t n) {
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, "unpack_int6: packed must be uint8, got ",
                   packed.scalar_type());
  TORCH_CHECK_VALUE(n >= 0, "unpack_int6: n must be >= 0, got ", n);
  TORCH_CHECK_VALUE(packed.dim() >= 1 && packed.size(-1) == int6_row_bytes(n),
                    "unpack_int6: packed must be (..., 3 * ceil(n / 4))=(..., ", int6_row_bytes(n),
                    ") for n=", n, ", got ", packed.sizes());
  Rows result{1, n, packed.sizes().vec()};
  for (int64_t i = 0; i + 1 < packed.dim(); ++i) result.rows *= packed.size(i);
  result.sizes.back() = n;
  return result;
}

at::Tensor pack_cpu(const at::Tensor& codes) {
  const Rows shape = check_codes(codes);
  const at::Tensor in = codes.contiguous();
  const int8_t* data = const_pointer<int8_t>(in);
  const int64_t bad = int6_first_bad_code(data, in.numel());
  TORCH_CHECK_VALUE(bad < 0, "pack_int6: codes must be in [-32, 31], got ", static_cast<int>(data[bad]),
                    " at flat index ", bad, "; clamp before packing");
  at::Tensor out = at::empty(shape.sizes, in.options().dtype(at::kByte));
  pack_int6_cpu(data, mutable_pointer<uint8_t>(out), shape.rows, shape.n, at::get_num_threads());
  return out;
}

at::Tensor unpack_cpu(const at::Tensor& packed, int64_t n) {
  const Rows shape = check_packed(packed, n);
  const at::Tensor in = packed.contiguous();
  at::Tensor out = at::empty(shape.sizes, in.options().dtype(at::kChar));
  unpack_int6_cpu(const_pointer<uint8_t>(in), mutable_pointer<int8_t>(out), shape.rows, shape.n,
                  at::get_num_threads());
  return out;
}

#ifdef PGOLF_WITH_CUDA
at::Tensor pack_cuda(const at::Tensor& codes) {
  const Rows shape = check_codes(codes);
  const c10::cuda::CUDAGuard guard(codes.device());
  const at::Tensor in = codes.contiguous();
  at::Tensor out = at::empty(shape.sizes, in.options().dtype(at::kByte));
  pack_int6_cuda(const_pointer<int8_t>(in), mutable_pointer<uint8_t>(out), shape.rows, shape.n,
                 c10::cuda::getCurrentCUDAStream().stream());
  return out;
}

at::Tensor unpack_cuda(const at::Tensor& packed, int64_t n) {
  const Rows shape = check_packed(packed, n);
  const c10::cuda::CUDAGuard guard(packed.device());
  const at::Tensor in = packed.contiguous();
  at::Tensor out = at::empty(shape.sizes, in.options().dtype(at::kChar));
  unpack_int6_cuda(const_pointer<uint8_t>(in), mutable_pointer<int8_t>(out), shape.rows, shape.n,
                   c10::cuda::getCurrentCUDAStream().stream());
  return out;
}
#endif

}  // namespace
}  // namespace pgolf

TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("pack_int6(Tensor codes) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("unpack_int6(Tensor packed, SymInt n) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("pack_int6", &pgolf::pack_cpu);
  m.impl("unpack_int6", &pgolf::unpack_cpu);
}

#ifdef PGOLF_WITH_CUDA
TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("pack_int6", &pgolf::pack_cuda);
  m.impl("unpack_int6", &pgolf::unpack_cuda);
}
#endif
