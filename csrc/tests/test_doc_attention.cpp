// doc_attention's Hopper kernels, run on the host (host_cuda/cuda_runtime.h), against a direct float64
// evaluation; the drawing of tiles, their list and the polynomial for exponentials also alone.
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

// A list of tiles as it may be in memory that held something else: a kernel must not count on zeros.
std::vector<DocTile> unwritten_plan(const DocAttentionShape& shape, int size) {
  return std::vector<DocTile>(static_cast<size_t>(doc_attention_max_tiles(shape, size) + 1),
                              DocTile{1 << 28, 1 << 28, 1 << 28, 1 << 28});
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

struct Problem {
  std::vector<int32_t> starts;  // of documents
  DocAttentionShape shape;
  Heads q, k, all, grad;
  int of_q, of_k;  // elements of a token
  bf16* values() { return all.values.data() + of_q + of_k; }
};

Problem make_problem(const Case& at) {
  std::vector<int32_t> starts{0};
  for (const int32_t length : at.lengths) starts.push_back(starts.back() + length);
  const int64_t tokens = starts.back();
  const int of_q = at.heads * kColumns, of_k = at.groups * kColumns;
  // v is the end of wider rows, as in a product of q, k and v.
  const int wide = of_q + 2 * of_k;
  return {.starts = starts,
          .shape = {tokens, at.heads, at.groups, static_cast<int>(at.lengths.size()), 0.15f},
          .q = {random_matrix(tokens * of_q, 1 + at.seed, at.size), of_q},
          .k = {random_matrix(tokens * of_k, 2 + at.seed), of_k},
          .all = {random_matrix(tokens * wide, 3 + at.seed), wide},
          .grad = {random_matrix(tokens * of_q, 4 + at.seed), of_q},
          .of_q = of_q,
          .of_k = of_k};
}

struct Found {
  Heads y, dk, dv;
  std::vector<float> lse, dq;
};

Found compute(Problem& in) {
  const DocAttentionShape& shape = in.shape;
  const auto count = static_cast<size_t>(shape.tokens * shape.heads);
  const Heads of_groups{unwritten(shape.tokens * in.of_k), in.of_k};
  Found found{.y = {unwritten(shape.tokens * in.of_q), in.of_q},
              .dk = of_groups,
              .dv = of_groups,
              .lse = std::vector<float>(count, NAN),
              .dq = std::vector<float>(count * kColumns, NAN)};
  std::vector<float> delta(count, NAN);
  std::vector<DocTile> plan = unwritten_plan(shape, doc_attention_queries(shape.heads / shape.groups));
  doc_attention_sm90({.q = in.q.values.data(),
                      .k = in.k.values.data(),
                      .v = in.values(),
                      .q_stride = in.q.stride,
                      .k_stride = in.k.stride,
                      .v_stride = in.all.stride,
                      .documents = in.starts.data(),
                      .plan = plan.data(),
                      .y = found.y.values.data(),
                      .lse = found.lse.data()},
                     shape, nullptr);
  std::vector<DocTile> back = unwritten_plan(shape, kDocKeys);
  std::vector<uint32_t> filled(static_cast<size_t>(doc_attention_flags(shape)), 7);
  doc_attention_backward_sm90({.q = in.q.values.data(),
                               .k = in.k.values.data(),
                               .v = in.values(),
                               .grad = in.grad.values.data(),
                               .q_stride = in.q.stride,
                               .k_stride = in.k.stride,
                               .v_stride = in.all.stride,
                               .grad_stride = in.grad.stride,
                               .y = found.y.values.data(),
                               .lse = found.lse.data(),
                               .documents = in.starts.data(),
                               .delta = delta.data(),
                               .plan = back.data(),
                               .filled = filled.data(),
                               .dq = found.dq.data(),
                               .dk = found.dk.values.data(),
                               .dv = found.dv.values.data()},
                              shape, nullptr);
  return found;
}

void test_matches_float64(const Case& at) {
  launch_seed = at.seed;
  Problem problem = make_problem(at);
  const auto& [y, dk, dv, lse, dq] = compute(problem);
  const auto& [starts, shape, q, k, all, grad, of_q, of_k] = problem;
  const int64_t tokens = shape.tokens, ratio = at.heads / at.groups;
  const auto value = [&](int64_t token, int64_t group, int64_t column) {
    return all.at(token, at.heads + at.groups + group, column);
  };

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

// Results that get something of masked pairs alone are 0, exactly, however large that is. In the second
// document only the last token has a key and a value, which no earlier query may see, and only the first one
// a gradient, which no later key may get. All of the documents next to it is large.
void test_masked_pairs_are_zero(int heads) {
  Problem problem = make_problem({{30, 100, 60}, heads, 1, 300.0f, 30});
  for (Heads* const large : {&problem.k, &problem.all, &problem.grad})
    for (bf16& value : large->values) value = from_float<bf16>(300.0f * to_float(value));
  const int64_t begin = problem.starts[1], end = problem.starts[2];
  const auto clear = [](Heads& of, int64_t first, int64_t last) {
    std::fill(of.values.begin() + first * of.stride, of.values.begin() + last * of.stride,
              from_float<bf16>(0.0f));
  };
  clear(problem.k, begin, end - 1);
  clear(problem.all, begin, end - 1);
  clear(problem.grad, begin + 1, end);
  const Found found = compute(problem);
  for (int64_t c = 0; c < kColumns; ++c) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t head = 0; head < heads && i < end - 1; ++head) {
        check(found.y.at(i, head, c) == 0.0, "y of earlier queries");
        check(found.dq[static_cast<size_t>((i * heads + head) * kColumns + c)] == 0.0f,
              "dq of earlier queries");
      }
      check(i == begin || found.dk.at(i, 0, c) == 0.0, "dk of later keys");
      check(i == begin || found.dv.at(i, 0, c) == 0.0, "dv of later keys");
    }
  }
}

void test_polynomial() {
  using namespace attention::backward;
  const auto power = [](float x) { return ex2_polynomial(x, 1.0f / kRange, kBias / kRange); };
  for (float x = -126.0f; x < 128.0f; x += 0.00171f) {
    // Of this 5e-6 is the rounding of x.
    check(std::abs(power(x) / std::exp2(static_cast<double>(x)) - 1.0) < 9.2e-5, "2^" + std::to_string(x));
  }
  for (int x = -126; x < 128; ++x)
    check(power(static_cast<float>(x)) == std::ldexp(1.0f, x), "a whole power of 2 is exact");
  for (float x = -127.0f; x < -126.0f; x += 0.001f)
    check(power(x) >= 0.0f && power(x) < std::ldexp(1.0f, -126), "below the least normal number");
  for (const float x : {-127.0f, -127.01f, -1e4f, -3e38f, -INFINITY, NAN})
    check(std::bit_cast<uint32_t>(power(x)) == 0, "2^" + std::to_string(x) + " is 0");
}

// The list of tiles alone, which is the only part that long documents and many of them are quick enough for.
void test_plan(const std::vector<int32_t>& lengths, int size, const std::string& what) {
  std::vector<int32_t> starts{0};
  for (const int32_t length : lengths) starts.push_back(starts.back() + length);
  const DocAttentionShape shape{starts.back(), 1, 1, static_cast<int>(lengths.size()), 1.0f};
  std::vector<DocTile> plan = unwritten_plan(shape, size);
  std::vector<uint32_t> flags(lengths.size() + 1, 7);
  launch_kernel(attention::plan_kernel, {.blocks = 1, .threads = attention::kPlanThreads}, nullptr,
                starts.data(), shape.segments, size, plan.data(), flags.data(),
                static_cast<int64_t>(lengths.size()));
  check(plan[0].begin == 0, what + ": no tile is drawn yet");
  check(flags.back() == 7 && std::ranges::count(flags, 0u) == static_cast<int64_t>(lengths.size()),
        what + ": zeros for its flags");
  // Every token has one tile of its own document; those of a document are next to each other, the last one
  // first, and no document comes before a longer one, as far as they are told apart.
  const auto work = [&](int begin, int end) {
    return std::min((end - begin + size - 1) / size, attention::kPlanSizes);
  };
  const auto count = static_cast<size_t>(plan[0].first);
  std::vector<bool> seen(lengths.size());
  int longest = attention::kPlanSizes;
  size_t at = 1;
  int64_t tokens = 0;
  while (at <= count) {
    const DocTile head = plan[at];
    const auto found = std::upper_bound(starts.begin(), starts.end(), head.begin) - starts.begin() - 1;
    const auto document = static_cast<size_t>(found);
    check(starts[document] == head.begin && starts[document + 1] == head.end && !seen[document],
          what + ": a document that is there, once");
    seen[document] = true;
    check(work(head.begin, head.end) <= longest, what + ": the longest documents come first");
    longest = work(head.begin, head.end);
    const int tiles = (head.end - head.begin + size - 1) / size;
    for (int i = 0; i < tiles; ++i, ++at) {
      const DocTile& tile = plan[at];
      const int first = head.begin + (tiles - 1 - i) * size;
      check(at <= count && tile.first == first && tile.begin == head.begin && tile.end == head.end,
            what + ": the tiles of a document in their order");
    }
    tokens += head.end - head.begin;
  }
  check(tokens == shape.tokens, what + ": all documents that are not empty");
}

constexpr int kWalkers = 3;  // warps

// taken: by warp and item, one from each lane.
void drawing_kernel(DocTile* plan, int groups, bool own_first, int* taken, int items) {
  const uint32_t drawn = shared_address(dynamic_shared());
  if (threadIdx.x == 0) {
    attention::Drawn{drawn}.init(kWalkers);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    attention::Draw draw(plan, groups, drawn, own_first);
    while (draw.next()) draw.ask();
  } else if (threadIdx.x >= 32) {
    attention::Walk walk(plan, groups, drawn);
    while (walk.next()) {
      check(walk.item < items, "no item after the last one");
      check(walk.tile().first == walk.item / groups && walk.group() == walk.item % groups,
            "its tile and group");
      atomicAdd(taken + (static_cast<int>(threadIdx.x) / 32 - 1) * items + walk.item, 1);
    }
  }
}

// Drawing alone. The kernels of attention wait for a tile's queries or keys before they draw the one after
// the next, which hides what goes wrong if more is drawn than was read.
void test_drawing(int tiles, int groups, bool own_first, uint32_t seed) {
  launch_seed = seed;
  std::vector<DocTile> plan{DocTile{tiles, 0, 0, 0}};
  for (int i = 0; i < tiles; ++i) plan.push_back(DocTile{i, 0, 0, 0});
  const int items = tiles * groups;
  std::vector<int> taken(static_cast<size_t>(kWalkers * items));
  launch_kernel(drawing_kernel,
                {.blocks = 2, .threads = 32 * (1 + kWalkers), .shared = attention::kDrawnBytes}, nullptr,
                plan.data(), groups, own_first, taken.data(), items);
  check(std::ranges::all_of(taken, [](int lanes) { return lanes == 32; }),
        "each warp goes to each item once, with all lanes, with seed " + std::to_string(seed));
}

// Documents of 1 to 200 tokens.
std::vector<int32_t> some_lengths(int count) {
  std::vector<int32_t> lengths;
  for (int i = 0; i < count; ++i) lengths.push_back(1 + i * 67 % 200);
  return lengths;
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
    test_polynomial();
    for (const int heads : {1, 4}) test_masked_pairs_are_zero(heads);
    // Far more tiles than are drawn ahead, of more documents and groups than there are blocks.
    multiprocessors = 3;
    blocks_together = true;  // some wait for the zeros that others write
    for (uint32_t seed = 9; seed < 21; ++seed) test_matches_float64({{300}, 1, 1, 1.0f, seed});
    for (const uint32_t seed : {7u, 8u}) test_matches_float64({some_lengths(10), 4, 4, 1.0f, seed});
    for (uint32_t seed = 0; seed < 24; ++seed) test_drawing(7, 3, seed % 2 == 0, seed);
    // Lists of tiles of documents that are too long to compute here: of 256 tiles and more, which are alike,
    // and of more documents than threads.
    const std::vector<int32_t> lengths{48 * 256, 48 * 255, 1, 48 * 257 + 1, 0, 48 * 400, 47, 48 * 255 + 1};
    test_plan(lengths, 48, "long documents");
    test_plan(std::vector<int32_t>(65536, 1), 96, "65,536 documents");
    test_plan(some_lengths(2500), 64, "more documents than threads");
  });
}
