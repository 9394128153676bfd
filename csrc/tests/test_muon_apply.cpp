// muon_apply's CUDA kernels, run on the host (host_cuda/cuda_runtime.h), against float64 and against the
// kernel for CPUs: with and without cautious decay and EMA-Nesterov, both types of update, several launches,
// ends of tensors and addresses that are not 16-byte aligned.
#include <math.h>  // isfinite outside namespace std

#include <limits>

#include "kernels/common.h"
#include "tests/check.h"

#undef PGOLF_UNROLL
#define PGOLF_UNROLL  // g++ has no such pragma

#include "kernels/muon_apply.cuh"

namespace pgolf::test {
namespace {

// X is the type of the updates.
template <typename X>
struct Tensors {
  std::vector<std::vector<float>> params, averages, bases, velocities;
  std::vector<std::vector<X>> updates;

  // Weights of both signs, updates of both signs, and zeros among them.
  explicit Tensors(const std::vector<int64_t>& sizes) {
    unsigned seed = 0;
    for (const int64_t size : sizes) {
      params.push_back(normal_values(size, ++seed));
      averages.push_back(normal_values(size, ++seed));
      bases.push_back(normal_values(size, ++seed));
      velocities.push_back(normal_values(size, ++seed));
      updates.emplace_back();
      for (const float value : normal_values(size, ++seed)) updates.back().push_back(from_float<X>(value));
      for (size_t i = 0; i < params.back().size(); i += 5) params.back()[i] = 0.0f;
      for (size_t i = 0; i < params.back().size(); i += 7) updates.back()[i] = from_float<X>(0.0f);
    }
  }

  // `skip` elements of each tensor are left out at its start, which moves the addresses.
  std::vector<MuonTarget> targets(int64_t skip, bool with_averages) {
    std::vector<MuonTarget> all;
    for (size_t i = 0; i < params.size(); ++i) {
      const int64_t count = static_cast<int64_t>(params[i].size()) - skip;
      all.push_back({.param = params[i].data() + skip,
                     .update = updates[i].data() + skip,
                     .average = with_averages ? averages[i].data() + skip : nullptr,
                     .count = count,
                     .lr_scale = 1.0f + static_cast<float>(i)});
    }
    return all;
  }

  std::vector<Ahead<MuonTarget>> ahead_targets(int64_t skip, bool with_averages) {
    std::vector<Ahead<MuonTarget>> all;
    for (const MuonTarget& target : targets(skip, with_averages)) {
      const size_t i = all.size();
      all.push_back({target, bases[i].data() + skip, velocities[i].data() + skip});
    }
    return all;
  }
};

template <typename X, bool Cautious, typename Target>
void run_on_host(const std::vector<Target>& targets, const float* hyper) {
  launch_apply(targets.data(), static_cast<int>(targets.size()), hyper,
               [&](const ApplyArgs<Target>& args, unsigned int blocks) {
                 launch(blocks, kApplyThreads,
                        [&] { muon_apply_kernel<typename DeviceType<X>::type, Cautious, Target>(args); });
               });
}

struct Case {
  std::vector<int64_t> sizes;
  int64_t skip = 0;
  bool averages = true;
};

template <typename X, bool Cautious>
void test_apply(const Case& at) {
  const float hyper[kHyperCount] = {0.1f, 0.9f, 0.2f, 0.5f, 0.25f};
  const Tensors<X> before(at.sizes);
  Tensors<X> got = before, on_cpu = before;
  const std::vector<MuonTarget> others = on_cpu.targets(at.skip, at.averages);
  run_on_host<X, Cautious>(got.targets(at.skip, at.averages), hyper);
  muon_apply_cpu<X>(others.data(), static_cast<int>(others.size()), hyper, Cautious, 1);
  for (size_t i = 0; i < at.sizes.size(); ++i) {
    for (size_t k = 0; k < before.params[i].size(); ++k) {
      const bool inside = static_cast<int64_t>(k) >= at.skip;
      const double p = before.params[i][k], o = to_float(before.updates[i][k]), a = before.averages[i][k];
      const double keep = !Cautious || p * o > 0 ? 1 - 0.1 * 0.2 : 1.0;
      const double want = inside ? p * keep - 0.1 * (1.0 + static_cast<double>(i)) * o : p;
      const std::string where = " " + std::to_string(k) + " of tensor " + std::to_string(i);
      check_close(got.params[i][k], want, 1e-5, 1e-6, "weight" + where);
      check_close(got.averages[i][k], inside && at.averages ? a + 0.25 * (want - a) : a, 1e-5, 1e-6,
                  "average" + where);
      check_close(got.params[i][k], on_cpu.params[i][k], 1e-6, 1e-6, "weight on the CPU" + where);
      check_close(got.averages[i][k], on_cpu.averages[i][k], 1e-6, 1e-6, "average on the CPU" + where);
    }
  }
}

// The weights are those of a step without EMA-Nesterov, bit for bit.
template <typename X, bool Cautious>
void test_ahead(const Case& at, float weight) {
  const float hyper[kHyperCount] = {0.1f, 0.9f, 0.2f, 0.5f, 0.25f, weight, 0.6f};
  const Tensors<X> before(at.sizes);
  Tensors<X> got = before, on_cpu = before, plain = before;
  const std::vector<Ahead<MuonTarget>> others = on_cpu.ahead_targets(at.skip, at.averages);
  run_on_host<X, Cautious>(plain.targets(at.skip, at.averages), hyper);
  run_on_host<X, Cautious>(got.ahead_targets(at.skip, at.averages), hyper);
  muon_apply_cpu<X>(others.data(), static_cast<int>(others.size()), hyper, Cautious, 1);
  check(got.averages == plain.averages, "EMA-Nesterov changed an average");
  for (size_t i = 0; i < at.sizes.size(); ++i) {
    for (size_t k = 0; k < before.params[i].size(); ++k) {
      const bool inside = static_cast<int64_t>(k) >= at.skip;
      const std::string where = " " + std::to_string(k) + " of tensor " + std::to_string(i);
      const double x = plain.params[i][k], base = before.bases[i][k], old = before.velocities[i][k];
      const double v = inside ? old + weight * (x - base - old) : old;
      check(got.bases[i][k] == (inside ? plain.params[i][k] : before.bases[i][k]), "base" + where);
      check_close(got.velocities[i][k], v, 1e-5, 1e-6, "velocity" + where);
      check_close(got.params[i][k], inside ? x + 0.6 * v : x, 1e-5, 1e-6, "parameter" + where);
      check_close(on_cpu.bases[i][k], got.bases[i][k], 1e-6, 1e-6, "base on the CPU" + where);
      check_close(on_cpu.velocities[i][k], got.velocities[i][k], 1e-6, 1e-6, "velocity on the CPU" + where);
      check_close(on_cpu.params[i][k], got.params[i][k], 2e-6, 2e-6, "parameter on the CPU" + where);
    }
  }
}

template <typename X, bool Cautious>
void test_skip() {
  for (float scale : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const float hyper[kHyperCount] = {0.1f, 0.9f, 0.2f, scale, 0.25f, 0.5f, 0.6f};
    const Tensors<X> before({20});
    Tensors<X> got = before, ahead = before, on_cpu = before;
    run_on_host<X, Cautious>(got.targets(0, true), hyper);
    check(got.params == before.params && got.averages == before.averages, "a skipped step changed something");
    run_on_host<X, Cautious>(ahead.ahead_targets(0, true), hyper);
    muon_apply_cpu<X>(on_cpu.ahead_targets(0, true).data(), 1, hyper, Cautious, 1);
    for (const Tensors<X>& after : {ahead, on_cpu}) {
      check(after.averages == before.averages && after.bases == before.bases &&
                after.velocities == before.velocities,
            "a skipped step changed more than the parameters");
      for (size_t k = 0; k < 20; ++k) {
        const double want = before.bases[0][k] + 0.6 * before.velocities[0][k];
        check_close(after.params[0][k], want, 1e-6, 1e-6, "a skipped step did not go back");
      }
    }
  }
}

template <typename X, bool Cautious>
void test_all() {
  // More tensors than one launch takes, empty ones among them.
  std::vector<int64_t> many;
  for (int i = 0; i < kMaxTargets<MuonTarget> + 3; ++i) many.push_back(i % 3 == 0 ? 0 : i);
  many.insert(many.end(), static_cast<size_t>(kMaxTargets<MuonTarget>), 3);
  const Case cases[] = {{{1, 8, 9, 4096, 2 * kApplyRun + 5}},
                        {.sizes = {kApplyRun + 12, 17}, .averages = false},
                        {.sizes = {kApplyRun + 12, 17}, .skip = 1},
                        {many}};
  for (const Case& at : cases) {
    test_apply<X, Cautious>(at);
    for (float weight : {0.0f, 0.25f, 0.75f, 1.0f}) test_ahead<X, Cautious>(at, weight);
  }
  test_skip<X, Cautious>();
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf;
    test::test_all<float, false>();
    test::test_all<float, true>();
    test::test_all<bf16, false>();
    test::test_all<bf16, true>();
  });
}
