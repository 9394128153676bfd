// doc_attention's Hopper kernels, run on the host (host_cuda/cuda_runtime.h), against a direct float64
// evaluation.
#include <limits>
#include <numeric>

#include "kernels/common.h"
#include "tests/check.h"

#undef PGOLF_UNROLL
#define PGOLF_UNROLL  // g++ has no such pragma

#include "kernels/doc_attention_sm90.cu"

namespace pgolf::test {
namespace {

using Matrix = std::vector<bf16>;
constexpr int kColumns = kDocWidth;

struct Case {
  std::vector<int32_t> lengths;  // of documents
  int heads, groups;
  float size = 1.0f;  // of queries, for scores that are far apart
  uint32_t seed = 0;
};

Matrix random_matrix(int64_t count, unsigned seed, float factor = 1.0f) {
  Matrix values;
  for (const float value : normal_values(count, seed)) values.push_back(from_float<bf16>(factor * value));
  return values;
}

// Filled with NaN, so that what is not written is found.
Matrix unwritten(int64_t count) {
  return Matrix(static_cast<size_t>(count), from_float<bf16>(std::numeric_limits<float>::quiet_NaN()));
}

// (tokens, heads, 64) in rows of `stride` elements.
struct Heads {
  Matrix values;
  int64_t stride;
  double at(int64_t token, int64_t head, int64_t column) const {
    return to_float(values[static_cast<size_t>(token * stride + head * kColumns + column)]);
  }
};

// What is compared: sums of squares of the errors and of the true values.
struct Error {
  double error = 0.0, truth = 0.0;
  void add(double got, double want) {
    error += (got - want) * (got - want);
    truth += want * want;
  }
  void check_below(double limit, const std::string& what) const {
    const double relative = std::sqrt(error / std::max(truth, 1e-30));
    check(relative < limit || (truth < 1e-20 && error < 1e-6),
          what + " differs by " + std::to_string(relative));
  }
};

void test_matches_float64(const Case& at) {
  launch_seed = at.seed;
  std::vector<int32_t> starts{0};
  for (const int32_t length : at.lengths) starts.push_back(starts.back() + length);
  const int64_t tokens = starts.back(), ratio = at.heads / at.groups;
  const DocAttentionShape shape{tokens, at.heads, at.groups, static_cast<int>(at.lengths.size()), 0.15f};
  const int64_t of_q = int64_t{at.heads} * kColumns, of_k = int64_t{at.groups} * kColumns;
  // v is the end of wider rows, as in a product of q, k and v.
  const int64_t wide = of_q + 2 * of_k;
  const Heads q{random_matrix(tokens * of_q, 1 + at.seed, at.size), of_q};
  const Heads k{random_matrix(tokens * of_k, 2 + at.seed), of_k};
  const Heads all{random_matrix(tokens * wide, 3 + at.seed), wide};
  const Heads grad{random_matrix(tokens * of_q, 4 + at.seed), of_q};
  const auto value = [&](int64_t token, int64_t group, int64_t column) {
    return all.at(token, at.heads + at.groups + group, column);
  };
  Heads y{unwritten(tokens * of_q), of_q}, dk{unwritten(tokens * of_k), of_k}, dv = dk;
  const auto count = static_cast<size_t>(tokens * at.heads);
  std::vector<float> lse(count, NAN), delta(count, NAN), dq(count * kColumns, NAN);
  std::vector<DocTile> plan(static_cast<size_t>(
      doc_attention_max_tiles(shape, doc_attention_queries(static_cast<int>(ratio))) + 1));
  doc_attention_sm90({.q = q.values.data(),
                      .k = k.values.data(),
                      .v = all.values.data() + of_q + of_k,
                      .q_stride = of_q,
                      .k_stride = of_k,
                      .v_stride = wide,
                      .documents = starts.data(),
                      .plan = plan.data(),
                      .y = y.values.data(),
                      .lse = lse.data()},
                     shape, nullptr);
  std::vector<DocTile> back(static_cast<size_t>(doc_attention_max_tiles(shape, kDocKeys) + 1));
  doc_attention_backward_sm90({.q = q.values.data(),
                               .k = k.values.data(),
                               .v = all.values.data() + of_q + of_k,
                               .grad = grad.values.data(),
                               .q_stride = of_q,
                               .k_stride = of_k,
                               .v_stride = wide,
                               .grad_stride = of_q,
                               .y = y.values.data(),
                               .lse = lse.data(),
                               .documents = starts.data(),
                               .delta = delta.data(),
                               .plan = back.data(),
                               .dq = dq.data(),
                               .dk = dk.values.data(),
                               .dv = dv.values.data()},
                              shape, nullptr);

  Error of_y, of_lse, of_dq, of_dk, of_dv;
  std::vector<double> want_dk(static_cast<size_t>(tokens * of_k)), want_dv = want_dk;
  for (size_t document = 0; document < at.lengths.size(); ++document) {
    const int64_t begin = starts[document], end = starts[document + 1];
    for (int64_t head = 0; head < at.heads; ++head) {
      const int64_t group = head / ratio;
      for (int64_t i = begin; i < end; ++i) {
        std::vector<double> p;
        double largest = -1e300, sum = 0.0;
        for (int64_t j = begin; j <= i; ++j) {
          double score = 0.0;
          for (int64_t c = 0; c < kColumns; ++c) score += q.at(i, head, c) * k.at(j, group, c);
          p.push_back(score * shape.scale);
          largest = std::max(largest, p.back());
        }
        for (double& score : p) sum += score = std::exp(score - largest);
        std::vector<double> out(kColumns), of_query(kColumns);
        for (int64_t j = begin; j <= i; ++j) {
          p[static_cast<size_t>(j - begin)] /= sum;
          for (int64_t c = 0; c < kColumns; ++c)
            out[static_cast<size_t>(c)] += p[static_cast<size_t>(j - begin)] * value(j, group, c);
        }
        double dot = 0.0;
        for (int64_t c = 0; c < kColumns; ++c) {
          of_y.add(y.at(i, head, c), out[static_cast<size_t>(c)]);
          dot += grad.at(i, head, c) * out[static_cast<size_t>(c)];
        }
        of_lse.add(lse[static_cast<size_t>(head * tokens + i)], largest + std::log(sum));
        for (int64_t j = begin; j <= i; ++j) {
          const double weight = p[static_cast<size_t>(j - begin)];
          double along = 0.0;
          for (int64_t c = 0; c < kColumns; ++c) along += grad.at(i, head, c) * value(j, group, c);
          const double ds = shape.scale * weight * (along - dot);
          for (int64_t c = 0; c < kColumns; ++c) {
            const auto place = static_cast<size_t>(j * of_k + group * kColumns + c);
            of_query[static_cast<size_t>(c)] += ds * k.at(j, group, c);
            want_dk[place] += ds * q.at(i, head, c);
            want_dv[place] += weight * grad.at(i, head, c);
          }
        }
        for (int64_t c = 0; c < kColumns; ++c)
          of_dq.add(dq[static_cast<size_t>((i * at.heads + head) * kColumns + c)],
                    of_query[static_cast<size_t>(c)]);
      }
    }
  }
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t group = 0; group < at.groups; ++group) {
      for (int64_t c = 0; c < kColumns; ++c) {
        const auto place = static_cast<size_t>(token * of_k + group * kColumns + c);
        of_dk.add(dk.at(token, group, c), want_dk[place]);
        of_dv.add(dv.at(token, group, c), want_dv[place]);
      }
    }
  }
  std::string name = std::to_string(at.heads) + " heads, " + std::to_string(at.groups) + " groups, documents";
  for (const int32_t length : at.lengths) name += " " + std::to_string(length);
  of_y.check_below(4e-3, name + ": y");
  of_lse.check_below(1e-4, name + ": lse");
  // delta is that of the rounded y.
  of_dq.check_below(2e-2, name + ": dq");
  of_dk.check_below(2e-2, name + ": dk");
  of_dv.check_below(5e-3, name + ": dv");
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    multiprocessors = 2;
    // No token, one; a tile less or more one; tiles and parts, an empty document, more tiles than blocks;
    // each number of heads per group; scores of which few count.
    for (const Case& at :
         {Case{{0}, 2, 1}, Case{{1}, 2, 1}, Case{{127}, 2, 1}, Case{{128}, 1, 1, 1.0f, 1},
          Case{{129}, 2, 1, 1.0f, 2}, Case{{1, 1, 1, 3}, 4, 1, 1.0f, 3}, Case{{97, 31}, 4, 1, 1.0f, 4},
          Case{{300, 0, 1, 70}, 4, 2, 1.0f, 5}, Case{{200}, 2, 1, 8.0f, 6}})
      test_matches_float64(at);
  });
}
