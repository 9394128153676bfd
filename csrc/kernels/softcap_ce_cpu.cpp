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

// One logit under the cap: z, and dz/dlogit = 1 - tanh^2.
struct Capped {
  float z;
  float slope;
};

// With e = exp(-2|u|) and q = 1 / (1 + e): tanh|u| = (1 - e) q, about 2 ulp, and 1 - tanh^2 = 4 e q^2,
// without cancellation at either end. Near 0 Cephes tanhf's odd polynomial, where 1 - e would cancel.
template <bool kHasCap>
[[gnu::always_inline]] inline Capped cap_logit(float x, float cap, float inverse_cap) {
  if constexpr (!kHasCap) return {x, 1.0f};
  const float u = x * inverse_cap;
  const float a = std::fabs(u);
  const float e = exp_f32(-2.0f * a);
  const float q = 1.0f / (1.0f + e);
  const float s = u * u;
  float p = -5.70498872745e-3f;
  p = p * s + 2.06390887954e-2f;
  p = p * s + -5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s + -3.33332819422e-1f;
  const float near = u + u * s * p;
  const float far = std::copysign((1.0f - e) * q, u);
  return {cap * (a < 0.625f ? near : far), 4.0f * e * q * q};
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

// The sum of exp(z - largest z) of one row, whose z it overwrites by the terms, and what follows from it.
struct RowSum {
  double total;
  float loss;
  float lse;
};

[[gnu::always_inline]] inline RowSum sum_row(float* z, int64_t vocab, int64_t target, float z_loss) {
  const float top = row_max(z, vocab);
  const double z_target = static_cast<double>(z[target]) - top;
  for (int64_t j = 0; j < vocab; ++j) z[j] = exp_f32(z[j] - top);
  const float own = z[target];
  z[target] = 0.0f;
  const double others = row_sum(z, vocab);
  z[target] = own;
  const double total = others + own;
  const double log_sum = std::log(total);
  const double lse = top + log_sum;
  const double loss = others < own ? std::log1p(others / own) : log_sum - z_target;
  const double penalty = z_loss == 0.0f ? 0.0 : z_loss * lse * lse;
  return {total, static_cast<float>(loss + penalty), static_cast<float>(lse)};
}

// What the upstream gradient is multiplied by: p of every logit, and the target's logit instead of p.
struct RowFactors {
  float probability;  // w = 1 + 2 z_loss lse
  float target;       // w p - 1 = (p - 1) + 2 z_loss lse p, with p = exp(-cross entropy)
};

inline RowFactors row_factors(float loss, float lse, float z_loss) {
  if (z_loss == 0.0f) return {1.0f, std::expm1(-loss)};
  const float rise = 2.0f * z_loss * lse;
  const float entropy = loss - z_loss * lse * lse;
  return {1.0f + rise, std::expm1(-entropy) + rise * std::exp(-entropy)};
}

template <typename T>
void fill_zero(T* row, int64_t vocab) {
  for (int64_t j = 0; j < vocab; ++j) row[j] = from_float<T>(0.0f);
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
struct GradientArgs {
  const T* logits;
  const int64_t* target;
  const float* grad_loss;
  int64_t grad_stride;
  float* loss;
  float* lse;
  T* grad_logits;
  SoftcapCeShape shape;
};

template <bool kHasCap, typename T>
[[gnu::always_inline]] inline void run_rows(const ForwardArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t vocab = args.shape.vocab;
  const float cap = args.shape.cap;
  const float inverse_cap = 1.0f / cap;
  std::vector<float> buffer(static_cast<size_t>(vocab));
  float* z = buffer.data();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = args.target[row];
    if (target == args.shape.ignore_index) {
      args.loss[row] = args.lse[row] = 0.0f;
      continue;
    }
    const T* x = args.logits + row * vocab;
    for (int64_t j = 0; j < vocab; ++j) z[j] = cap_logit<kHasCap>(to_float(x[j]), cap, inverse_cap).z;
    const RowSum sum = sum_row(z, vocab, target, args.shape.z_loss);
    args.loss[row] = sum.loss;
    args.lse[row] = sum.lse;
  }
}

template <bool kHasCap, typename T>
[[gnu::always_inline]] inline void run_rows(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t vocab = args.shape.vocab;
  const float cap = args.shape.cap;
  const float inverse_cap = 1.0f / cap;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = args.target[row];
    const T* x = args.logits + row * vocab;
    T* grad = args.grad_logits + row * vocab;
    if (target == args.shape.ignore_index) {
      fill_zero(grad, vocab);
      continue;
    }
    const float lse = args.lse[row];
    const RowFactors factors = row_factors(args.loss[row], lse, args.shape.z_loss);
    const float upstream = args.grad_loss[row] * factors.probability;
    const float slope = cap_logit<kHasCap>(to_float(x[target]), cap, inverse_cap).slope;
    for (int64_t j = 0; j < vocab; ++j) {
      const Capped capped = cap_logit<kHasCap>(to_float(x[j]), cap, inverse_cap);
      grad[j] = from_float<T>(upstream * exp_f32(capped.z - lse) * capped.slope);
    }
    grad[target] = from_float<T>(args.grad_loss[row] * factors.target * slope);
  }
}

template <bool kHasCap, typename T>
[[gnu::always_inline]] inline void run_rows(const GradientArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t vocab = args.shape.vocab;
  const float cap = args.shape.cap;
  const float inverse_cap = 1.0f / cap;
  std::vector<float> buffer(static_cast<size_t>(2 * vocab));
  float* z = buffer.data();
  float* slope = z + vocab;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = args.target[row];
    const T* x = args.logits + row * vocab;
    T* grad = args.grad_logits + row * vocab;
    if (target == args.shape.ignore_index) {
      args.loss[row] = args.lse[row] = 0.0f;
      fill_zero(grad, vocab);
      continue;
    }
    for (int64_t j = 0; j < vocab; ++j) {
      const Capped capped = cap_logit<kHasCap>(to_float(x[j]), cap, inverse_cap);
      z[j] = capped.z;
      slope[j] = capped.slope;
    }
    const RowSum sum = sum_row(z, vocab, target, args.shape.z_loss);
    args.loss[row] = sum.loss;
    args.lse[row] = sum.lse;
    const RowFactors factors = row_factors(sum.loss, sum.lse, args.shape.z_loss);
    const float grad_loss = args.grad_loss[row * args.grad_stride];
    const float upstream = static_cast<float>(grad_loss * factors.probability / sum.total);
    for (int64_t j = 0; j < vocab; ++j) grad[j] = from_float<T>(upstream * z[j] * slope[j]);
    grad[target] = from_float<T>(grad_loss * factors.target * slope[target]);
  }
}

template <bool kHasCap, typename Args>
PGOLF_TARGET("avx2,fma")
void run_rows_avx2(const Args& args, int64_t begin, int64_t end) {
  run_rows<kHasCap>(args, begin, end);
}

template <bool kHasCap, typename Args>
void run_capped(const Args& args, int threads) {
  const int64_t grain = kGrainElements / std::max<int64_t>(args.shape.vocab, 1) + 1;
  const bool wide = best_isa() != Isa::kBaseline;
  parallel_for(args.shape.rows, grain, threads, [&](int64_t begin, int64_t end) {
    wide ? run_rows_avx2<kHasCap>(args, begin, end) : run_rows<kHasCap>(args, begin, end);
  });
}

template <typename Args>
void run(const Args& args, int threads) {
  std::isinf(args.shape.cap) ? run_capped<false>(args, threads) : run_capped<true>(args, threads);
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
  run(ForwardArgs<T>{logits, target, loss, lse, shape}, threads);
}

template <typename T>
void softcap_ce_backward_cpu(const float* grad_loss, const T* logits, const int64_t* target,
                             const float* loss, const float* lse, T* grad_logits, const SoftcapCeShape& shape,
                             int threads) {
  run(BackwardArgs<T>{grad_loss, logits, target, loss, lse, grad_logits, shape}, threads);
}

template <typename T>
void softcap_ce_gradient_cpu(const T* logits, const int64_t* target, const float* grad_loss,
                             int64_t grad_stride, float* loss, float* lse, T* grad_logits,
                             const SoftcapCeShape& shape, int threads) {
  run(GradientArgs<T>{logits, target, grad_loss, grad_stride, loss, lse, grad_logits, shape}, threads);
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
template void softcap_ce_gradient_cpu(const float*, const int64_t*, const float*, int64_t, float*, float*,
                                      float*, const SoftcapCeShape&, int);
template void softcap_ce_gradient_cpu(const bf16*, const int64_t*, const float*, int64_t, float*, float*,
                                      bf16*, const SoftcapCeShape&, int);
template void softcap_ce_gradient_cpu(const f16*, const int64_t*, const float*, int64_t, float*, float*, f16*,
                                      const SoftcapCeShape&, int);

}  // namespace pgolf
