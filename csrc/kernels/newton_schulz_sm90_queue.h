// The order in which newton_schulz_sm90's products are queued. Host code.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "kernels/newton_schulz_sm90_plan.h"

namespace pgolf {
namespace ns90 {

// Latency of a product, in blocks of k that a multiprocessor could take meanwhile: flag, loads and stores,
// then its own blocks. Half or twice as much costs 1 %.
inline double latency_of(const Product& p) { return 20.0 + p.depth; }

// List scheduling: the matrices of a bank in up to kStrands strands, so that one's chain of products fills
// the waits of another's. Whenever a strand can go on, the one with the longest path left does. Writes the
// products and the runs; returns the number of tasks. 66 matrices on one H100: 0.638 ms, 0.653 in order of
// each bank's progress.
inline int queue_products(Plan& plan, const std::vector<std::vector<Product>>& chains,
                          const std::vector<int>& batches, int multiprocessors) {
  constexpr int kStrands = 4;
  struct Strand {
    const std::vector<Product>* chain;
    int first_product, first_matrix, count;
    size_t next;
    double ready, left;  // when the next product can start; path from there on
  };
  int products = 0;
  for (const auto& chain : chains) products += static_cast<int>(chain.size());
  const int most = std::clamp(kMaxRuns / std::max(products, 1), 1, kStrands);
  auto work = [&](const Strand& strand, const Product& p) {
    return static_cast<double>(strand.count) * p.tiles * p.depth / multiprocessors;
  };
  std::vector<Strand> strands;
  products = 0;
  for (size_t i = 0; i < chains.size(); ++i) {
    const int parts = std::min(most, batches[i]);
    for (int part = 0; part < parts; ++part) {
      const auto from = static_cast<int>(int64_t{batches[i]} * part / parts);
      const auto to = static_cast<int>(int64_t{batches[i]} * (part + 1) / parts);
      strands.push_back({&chains[i], products, from, to - from, 0, 0.0, 0.0});
      for (const Product& p : chains[i]) strands.back().left += work(strands.back(), p) + latency_of(p);
    }
    for (const Product& p : chains[i]) plan.products[products++] = p;
  }
  int tasks = 0;
  for (double now = 0.0;;) {
    Strand* best = nullptr;
    double start = 0.0;
    for (Strand& strand : strands) {
      if (strand.next == strand.chain->size()) continue;
      // What lies beside the chain neither waits for the product before it nor holds up the next.
      const double can = (*strand.chain)[strand.next].beside ? now : std::max(strand.ready, now);
      if (best == nullptr || can < start || (can == start && strand.left > best->left)) {
        best = &strand, start = can;
      }
    }
    if (best == nullptr) return tasks;
    const Product& p = (*best->chain)[best->next];
    if (plan.run_count == kMaxRuns) throw std::logic_error("newton_schulz: more runs than a launch takes");
    plan.runs[plan.run_count++] = {tasks, static_cast<uint32_t>(best->first_matrix),
                                   static_cast<uint32_t>(best->first_product + best->next)};
    tasks += best->count * p.tasks;
    now = start + work(*best, p);
    if (!p.beside) best->ready = now + latency_of(p);
    best->left -= work(*best, p) + latency_of(p);
    ++best->next;
  }
}

}  // namespace ns90
}  // namespace pgolf
