// CPU kernel of softcap_ce.h: one row at a time, float32, loops written so that the compiler vectorises them.
#include <cmath>
#include <vector>

#include "kernels/isa.h"
#include "kernels/parallel.h"
#include "kernels/softcap_ce.h"

namespace pgolf {
namespace {

// Independent partial sums: without them a float sum cannot be vectorised, and its error grows with the row.
constexpr int64_t kLanes = 16;
// Elements below which another thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;

// exp(x) for x <= 88, about 1 ulp; 0 below -87, where the result would soon be denormal. NaN stays NaN.
// Cephes expf: Cody-Waite reduction, polynomial of degree 5.
[[gnu::always_inline]] inline float exp_f32(float argument) {
  const float x = argument < -87.0f ? -87.0f : argument;
  const float magic = 12582912.0f;  // 1.5 * 2^23: the sum's low mantissa bits are the rounded integer
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const uint32_t scale = (float_to_bits(shifted) + 127u) << 23;
  const float result = (p * r * r + r + 1.0f) * bits_to_float(scale);
  return argument < -87.0f ? 0.0f : result;
}

// tanh(u), about 2 ulp. Cephes tanhf: an odd polynomial near 0, where 1 - 2 / (exp(2u) + 1) would cancel.
[[gnu::always_inline]] inline float tanh_f32(float u) {
  const float a = std::fabs(u);
  const float s = u * u;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s + -5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s + -3.33332819422e-1f;
  const float near = u + u * s * p;
  const float clamped = a > 20.0f ? 20.0f : a;
  const float far = std::copysign(1.0f - 2.0f / (exp_f32(2.0f * clamped) + 1.0f), u);
  return a < 0.625f ? near : far;
}

// 1 - tanh(u)^2 = 4 e / (1 + e)^2 with e = exp(-2|u|): no cancellation at either end.
[[gnu::always_inline]] inline float tanh_slope(float u) {
  const float e = exp_f32(-2.0f * std::fabs(u));
  const float q = 1.0f / (1.0f + e);
  return 4.0f * e * q * q;
}

// Largest non-NaN value.
[[gnu::always_inline]] inline float row_max(const float* z, int64_t n) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = -HUGE_VALF;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = z[j + l] > lanes[l] ? z[j + l] : lanes[l];
  }
  for (; j < n; ++j) lanes[0] = z[j] > lanes[0] ? z[j] : lanes[0];
  float result = lanes[0];
  for (float lane : lanes) result = lane > result ? lane : result;
  return result;
}

[[gnu::always_inline]] inline double row_sum(const float* e, int64_t n) {
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += e[j + l];
  }
  for (; j < n; ++j) lanes[0] += e[j];
  double result = 0.0;
  for (float lane : lanes) result += lane;
  return result;
}

template <typename T>
struct ForwardArgs {
  const T* logits;
  const int64_t* target;
  float* loss;
  float* lse;
  SoftcapCeShape shape;
};

template <typename T>
struct BackwardArgs {
  const float* grad_loss;
  const T* logits;
  const int64_t* target;
  const float* loss;
  const float* lse;
  T* grad_logits;
  SoftcapCeShape shape;
};

template <typename T>
[[gnu::always_inline]] inline void forward_rows(const ForwardArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t vocab = args.shape.vocab;
  const float cap = args.shape.cap;
  const float inverse_cap = 1.0f / cap;
  std::vector<float> buffer(static_cast<size_t>(vocab));
  float* z = buffer.data();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = args.target[row];
    if (target == args.shape.ignore_index) {
      args.loss[row] = 0.0f;
      args.lse[row] = 0.0f;
      continue;
    }
    const T* x = args.logits + row * vocab;
    for (int64_t j = 0; j < vocab; ++j) z[j] = cap * tanh_f32(to_float(x[j]) * inverse_cap);
    const float top = row_max(z, vocab);
    const double z_target = static_cast<double>(z[target]) - top;
    for (int64_t j = 0; j < vocab; ++j) z[j] = exp_f32(z[j] - top);
    const double own = z[target];
    z[target] = 0.0f;
    const double others = row_sum(z, vocab);
    const double log_sum = std::log(others + own);
    args.lse[row] = static_cast<float>(top + log_sum);
    args.loss[row] = static_cast<float>(others < own ? std::log1p(others / own) : log_sum - z_target);
  }
}

template <typename T>
[[gnu::always_inline]] inline void backward_rows(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t vocab = args.shape.vocab;
  const float cap = args.shape.cap;
  const float inverse_cap = 1.0f / cap;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = args.target[row];
    const T* x = args.logits + row * vocab;
    T* grad = args.grad_logits + row * vocab;
    if (target == args.shape.ignore_index) {
      for (int64_t j = 0; j < vocab; ++j) grad[j] = from_float<T>(0.0f);
      continue;
    }
    const float upstream = args.grad_loss[row];
    const float lse = args.lse[row];
    for (int64_t j = 0; j < vocab; ++j) {
      const float u = to_float(x[j]) * inverse_cap;
      grad[j] = from_float<T>(upstream * exp_f32(cap * tanh_f32(u) - lse) * tanh_slope(u));
    }
    const float slope = tanh_slope(to_float(x[target]) * inverse_cap);
    grad[target] = from_float<T>(upstream * std::expm1(-args.loss[row]) * slope);
  }
}

template <typename T>
PGOLF_TARGET("avx2,fma")
void forward_rows_avx2(const ForwardArgs<T>& args, int64_t begin, int64_t end) {
  forward_rows(args, begin, end);
}

template <typename T>
PGOLF_TARGET("avx2,fma")
void backward_rows_avx2(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
  backward_rows(args, begin, end);
}

int64_t grain_rows(const SoftcapCeShape& shape) {
  return kGrainElements / std::max<int64_t>(shape.vocab, 1) + 1;
}

}  // namespace

int64_t softcap_ce_first_bad_row(const int64_t* target, const SoftcapCeShape& shape) {
  for (int64_t row = 0; row < shape.rows; ++row) {
    const bool inside = target[row] >= 0 && target[row] < shape.vocab;
    if (!inside && target[row] != shape.ignore_index) return row;
  }
  return -1;
}

template <typename T>
void softcap_ce_forward_cpu(const T* logits, const int64_t* target, float* loss, float* lse,
                            const SoftcapCeShape& shape, int threads) {
  const ForwardArgs<T> args{logits, target, loss, lse, shape};
  const bool wide = best_isa() != Isa::kBaseline;
  parallel_for(shape.rows, grain_rows(shape), threads, [&](int64_t begin, int64_t end) {
    wide ? forward_rows_avx2(args, begin, end) : forward_rows(args, begin, end);
  });
}

template <typename T>
void softcap_ce_backward_cpu(const float* grad_loss, const T* logits, const int64_t* target,
                             const float* loss, const float* lse, T* grad_logits, const SoftcapCeShape& shape,
                             int threads) {
  const BackwardArgs<T> args{grad_loss, logits, target, loss, lse, grad_logits, shape};
  const bool wide = best_isa() != Isa::kBaseline;
  parallel_for(shape.rows, grain_rows(shape), threads, [&](int64_t begin, int64_t end) {
    wide ? backward_rows_avx2(args, begin, end) : backward_rows(args, begin, end);
  });
}

template void softcap_ce_forward_cpu(const float*, const int64_t*, float*, float*, const SoftcapCeShape&,
                                     int);
template void softcap_ce_forward_cpu(const bf16*, const int64_t*, float*, float*, const SoftcapCeShape&, int);
template void softcap_ce_forward_cpu(const f16*, const int64_t*, float*, float*, const SoftcapCeShape&, int);
template void softcap_ce_backward_cpu(const float*, const float*, const int64_t*, const float*, const float*,
                                      float*, const SoftcapCeShape&, int);
template void softcap_ce_backward_cpu(const float*, const bf16*, const int64_t*, const float*, const float*,
                                      bf16*, const SoftcapCeShape&, int);
template void softcap_ce_backward_cpu(const float*, const f16*, const int64_t*, const float*, const float*,
                                      f16*, const SoftcapCeShape&, int);

}  // namespace pgolf
