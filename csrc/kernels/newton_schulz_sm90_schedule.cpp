// The schedule of newton_schulz_sm90_schedule.h.
#include "kernels/newton_schulz_sm90_schedule.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace pgolf {
namespace ns90 {
namespace {

constexpr size_t kAlignment = 256;  // of each buffer in the workspace, bytes
constexpr int kTallDepth = 8;       // blocks of k above which tiles of 256 x 128 pay
constexpr int kTallRows = 1024;

size_t round_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int tiles_of(int64_t extent, int tile) { return static_cast<int>((extent + tile - 1) / tile); }

int64_t short_side(const NsBank& bank) { return std::min(bank.rows, bank.cols); }
int64_t long_side(const NsBank& bank) { return std::max(bank.rows, bank.cols); }

// Two iterations at a time, where the products on the short side are enough cheaper.
bool takes_pairs(const NsBank& bank, int steps) {
  return steps >= 2 && long_side(bank) >= 2 * short_side(bank);
}

// How often a bank's chain starts again from X.
int segment_count(const NsBank& bank, int steps) {
  return takes_pairs(bank, steps) ? (steps + 1) / 2 : steps;
}

int product_count(const NsBank& bank, int steps) {
  return takes_pairs(bank, steps) ? steps / 2 * 7 + steps % 2 * 3 : 3 * steps;
}

// Whether T lies with R and Z in the place of the next X.
bool has_room_for_three(const NsBank& bank) { return long_side(bank) >= 3 * short_side(bank); }

// The buffer of X when `left` segments are left: `out` and the workspace in turn, `out` last.
Buffer x_buffer(int left) { return left % 2 == 0 ? kOut : kX; }

// Takes the bank's buffers from the workspace at `at` on, and moves `at` behind them.
BankLayout lay_out(const NsBank& bank, int steps, const Tuning& tuning, size_t& at) {
  const auto matrix = static_cast<size_t>(bank.batch * bank.rows * bank.cols) * 2;
  const auto square = static_cast<size_t>(bank.batch * short_side(bank) * short_side(bank)) * 2;
  const auto take = [&](bool needed, size_t bytes) {
    const size_t begin = at;
    if (needed) at += round_up(bytes);
    return begin;
  };
  const bool pairs = takes_pairs(bank, steps);
  BankLayout layout{};
  layout.short_chain = tuning.short_chains && pairs;
  layout.has_spare = !layout.short_chain && pairs && !has_room_for_three(bank);
  // A short chain starts in `out`, unless a single iteration comes first, which brings X there from kX.
  layout.starts_in_out = (layout.short_chain ? steps : segment_count(bank, steps)) % 2 == 0;
  layout.x = take(true, matrix);
  layout.half_out = take(bank.type == NsType::kFloat32, matrix);
  layout.factor = take(true, layout.short_chain ? 3 * square : square);
  layout.spare = take(layout.has_spare, square);
  return layout;
}

// Writes one bank's chain of products.
class ChainWriter {
 public:
  ChainWriter(const NsBank& bank, const BankLayout& layout, int first_map, int first_matrix,
              const Tuning& tuning)
      : bank_(bank),
        layout_(layout),
        first_map_(first_map),
        first_matrix_(first_matrix),
        tuning_(tuning),
        short_(short_side(bank)),
        long_(long_side(bank)) {}

  std::vector<Product> write(const float (*table)[3], int steps) {
    const int segments = segment_count(bank_, steps);
    int step = 0;
    for (int segment = 0; segment < segments; ++segment) {
      // Of an odd number of iterations the first stands alone.
      const bool alone = !takes_pairs(bank_, steps) || (segment == 0 && steps % 2 == 1);
      power_ = segment == 0 ? 1 : 0;
      last_ = segment + 1 == segments;
      const Buffer from = x_buffer(segments - segment), to = x_buffer(segments - segment - 1);
      const Buffer squares = to == kOut ? kSquaresOut : kSquaresX;
      if (layout_.short_chain && alone) {
        write_single(kX, kOut, kSquaresX, square(kSquaresX, 1), table[step]);
      } else if (layout_.short_chain) {
        write_short_pair(table + step);
      } else if (alone) {
        write_single(from, to, squares, kFactor, table[step]);
      } else {
        write_pair(from, to, squares, table + step);
      }
      step += alone ? 1 : 2;
    }
    return chain_;
  }

 private:
  static Buffer square(Buffer squares, int i) { return static_cast<Buffer>(squares + i); }

  // X' = (a I + b R + c R^2) X with R = X X^T.
  void write_single(Buffer from, Buffer to, Buffer r, Buffer factor, const float (&abc)[3]) {
    add_gram(from, r);
    add_polynomial(r, factor, abc);
    add_update(factor, from, to);
  }

  // Two iterations at once: R = X X^T, Z = p(R), T = R Z, R1 = Z T, T = p1(R1), X' = (T Z) X.
  void write_pair(Buffer from, Buffer to, Buffer squares, const float (*abc)[3]) {
    const Buffer r = squares, z = square(squares, 1);
    const Buffer t = has_room_for_three(bank_) ? square(squares, 2) : kSpare;
    add_gram(from, r);
    add_polynomial(r, z, abc[0]);
    add_small(r, z, t);
    add_small(z, t, r);
    add_polynomial(r, t, abc[1]);
    add_small(t, z, kFactor);
    add_update(kFactor, from, to);
  }

  // The same with Y = Z X next to R1 and p1(R1), then X' = p1(R1) Y: one product less to wait for.
  void write_short_pair(const float (*abc)[3]) {
    const Buffer r = kSquaresX, z = square(kSquaresX, 1), t = square(kSquaresX, 2);
    add_gram(kOut, r);
    add_polynomial(r, z, abc[0]);
    const uint32_t after_z = need_;
    add_small(r, z, t);
    add_off_chain(z, kOut, kX, after_z);
    add_small(z, t, r);
    // The second counter counts Y and this polynomial: the update waits for both with one flag.
    add_polynomial(r, t, abc[1], true);
    add_update(t, kX, kOut, true);
  }

  void add_gram(Buffer x, Buffer r) {
    Product p = symmetric_product();
    p.layout = bank_.rows <= bank_.cols ? kRowsRows : kColumnsColumns;
    p.a_lower = p.b_lower = false;
    add(p, {short_, short_, long_}, {x, x, r}, tuning_.chunk);
  }

  // out = a I + b r + c r^2 with the scale of r, sigma^-2, taken out.
  void add_polynomial(Buffer r, Buffer out, const float (&abc)[3], bool signals_second = false) {
    Product p = symmetric_product();
    p.alpha = abc[2];
    p.beta = abc[1];
    p.gamma = abc[0];
    p.alpha_power = static_cast<uint8_t>(4 * power_);
    p.beta_power = static_cast<uint8_t>(2 * power_);
    p.added = true;
    p.signals_second = signals_second;
    add(p, {short_, short_, short_}, {r, r, out}, 1);
  }

  // A product of polynomials of one symmetric matrix is symmetric.
  void add_small(Buffer a, Buffer b, Buffer out) {
    add(symmetric_product(), {short_, short_, short_}, {a, b, out}, tuning_.chunk);
  }

  // to = factor from, on the short side.
  void add_update(Buffer factor, Buffer from, Buffer to, bool waits_second = false) {
    Product p{};
    p.alpha_power = power_;
    p.type = last_ ? bank_.type : NsType::kFloat16;
    p.direct = static_cast<float*>(bank_.out);
    p.waits_second = waits_second;
    add_large(p, factor, from, to);
  }

  // y = z x, next to the products that follow z. The next update waits for it and for the last of those.
  void add_off_chain(Buffer z, Buffer x, Buffer y, uint32_t need) {
    Product p{};
    p.type = NsType::kFloat16;
    p.signals_second = p.off_chain = true;
    p.need = need;
    add_large(p, z, x, y);
  }

  void add_large(Product p, Buffer factor, Buffer from, Buffer to) {
    const bool wide = bank_.rows <= bank_.cols;
    p.alpha = 1.0f;
    p.layout = wide ? kRowsColumns : kRowsRows;
    p.a_lower = wide;
    p.b_lower = !wide;
    add(p, {bank_.rows, bank_.cols, short_}, {wide ? factor : from, wide ? from : factor, to}, tuning_.chunk);
  }

  static Product symmetric_product() {
    Product p{};
    p.alpha = 1.0f;
    p.layout = kRowsRows;
    p.symmetric = p.a_lower = p.b_lower = true;
    p.type = NsType::kFloat16;
    return p;
  }

  struct Sizes {
    int64_t rows, cols, depth;
  };
  struct Buffers {
    Buffer a, b, out;
  };

  void add(Product p, const Sizes& sizes, const Buffers& buffers, int chunk) {
    // Operands along k come in boxes of 128 rows; across it, and on their way out, in boxes of 64.
    p.a = static_cast<uint8_t>(first_map_ + buffers.a + (p.layout != kColumnsColumns ? kFirstTallMap : 0));
    p.b = static_cast<uint8_t>(first_map_ + buffers.b + (p.layout == kRowsRows ? kFirstTallMap : 0));
    p.out = static_cast<uint8_t>(first_map_ + buffers.out);
    p.rows = static_cast<int>(sizes.rows);
    p.cols = static_cast<int>(sizes.cols);
    p.depth = tiles_of(sizes.depth, kBox);
    p.tall_tiles = p.depth > kTallDepth && sizes.rows >= kTallRows;
    p.shared_tile = tuning_.shared_tile && !p.tall_tiles;
    // Tiles of one task share A, which must fit in its slots.
    p.chunk = p.depth <= kASlots && !p.tall_tiles ? chunk : 1;
    p.panels = tiles_of(sizes.rows, p.tall_tiles ? 2 * kTile : kTile);
    p.across = tiles_of(sizes.cols, kTile);
    p.first_matrix = first_matrix_;
    if (!p.off_chain) p.need = p.waits_second ? second_need_ : need_;
    uint32_t& need = p.signals_second ? second_need_ : need_;
    for (int panel = 0; panel < p.panels; ++panel) {
      p.tasks += tasks_in_panel(p, panel);
      need += 2 * static_cast<uint32_t>(tiles_in_panel(p, panel));
      p.tiles += tiles_in_panel(p, panel) * (p.tall_tiles ? 2 : 1);
    }
    chain_.push_back(p);
  }

  NsBank bank_;
  BankLayout layout_;
  int first_map_, first_matrix_;
  Tuning tuning_;
  int64_t short_, long_;
  uint8_t power_ = 0;                    // of sigma, in the segment under way: X is scaled in the first only
  bool last_ = false;                    // whether that segment is the last
  uint32_t need_ = 0, second_need_ = 0;  // what the products so far bring the two counters to
  std::vector<Product> chain_;
};

// Latency of a product, in blocks of k that a multiprocessor could take meanwhile: flag, loads and stores,
// then its own blocks. Half or twice as much changes the time of the products by about 1 % (sweep in
// bench/results/20261124_nvidia-h100-80gb-hbm3_kernels/newton_schulz_sm90.log).
double latency_of(const Product& p) { return 20.0 + p.depth; }

// Some matrices of a bank, on their way through its chain.
struct Strand {
  const std::vector<Product>* chain;
  int first_product, first_matrix, count;
  size_t next;   // in the chain
  double ready;  // when that product can start
  double left;   // the path from there on

  const Product& product() const { return (*chain)[next]; }
  double work(const Product& p, int multiprocessors) const {
    return static_cast<double>(count) * p.tiles * p.depth / multiprocessors;
  }
};

// The matrices of each bank in up to kStrands strands; fewer where the launch would have too many runs.
std::vector<Strand> make_strands(const std::vector<std::vector<Product>>& chains, const NsBank* banks,
                                 int multiprocessors) {
  constexpr int kStrands = 4;
  int products = 0;
  for (const auto& chain : chains) products += static_cast<int>(chain.size());
  const int most = std::clamp(kMaxRuns / std::max(products, 1), 1, kStrands);
  std::vector<Strand> strands;
  products = 0;
  for (size_t i = 0; i < chains.size(); ++i) {
    const auto batch = static_cast<int>(banks[i].batch);
    const int parts = std::min(most, batch);
    for (int part = 0; part < parts; ++part) {
      const auto from = static_cast<int>(int64_t{batch} * part / parts);
      const auto to = static_cast<int>(int64_t{batch} * (part + 1) / parts);
      Strand strand{.chain = &chains[i],
                    .first_product = products,
                    .first_matrix = from,
                    .count = to - from,
                    .next = 0,
                    .ready = 0.0,
                    .left = 0.0};
      for (const Product& p : chains[i]) strand.left += strand.work(p, multiprocessors) + latency_of(p);
      strands.push_back(strand);
    }
    products += static_cast<int>(chains[i].size());
  }
  return strands;
}

// List scheduling, so that one strand's products fill the waits of another's: whenever a strand can go on,
// the one with the longest path left does. Writes the runs; returns the number of tasks. The products of 66
// matrices take 0.6385 ms on an H100 in this order and 0.6534 ms in order of each bank's progress (file as
// above). The model of time serves to order tasks and for nothing else (docs/findings.md, 2026-11-28).
int queue_strands(std::vector<Strand> strands, int multiprocessors, ProductQueue& queue) {
  int tasks = 0;
  for (double now = 0.0;;) {
    Strand* best = nullptr;
    double start = 0.0;
    for (Strand& strand : strands) {
      if (strand.next == strand.chain->size()) continue;
      // What lies off the chain neither waits for the product before it nor holds up the next.
      const double can = strand.product().off_chain ? now : std::max(strand.ready, now);
      if (best == nullptr || can < start || (can == start && strand.left > best->left)) {
        best = &strand;
        start = can;
      }
    }
    if (best == nullptr) return tasks;
    const Product& p = best->product();
    const double work = best->work(p, multiprocessors);
    if (queue.run_count == kMaxRuns) throw std::logic_error("newton_schulz: more runs than a launch takes");
    queue.runs[queue.run_count++] = {.first_task = tasks,
                                     .first_matrix = static_cast<uint32_t>(best->first_matrix),
                                     .product = static_cast<uint32_t>(best->first_product + best->next)};
    tasks += best->count * p.tasks;
    now = start + work;
    if (!p.off_chain) best->ready = now + latency_of(p);
    best->left -= work + latency_of(p);
    ++best->next;
  }
}

}  // namespace

// Two tiles of a row share an operand: 66 matrices took 0.583 ms on one H100, 0.604 with single tiles, 0.613
// with four of an update. With few tiles single ones make each matrix's chain of products shorter. The
// warpgroups share a tile only where most multiprocessors would have none: ten matrices in long chains took
// 0.195 ms, 0.202 with shared tiles. Short chains take more work, which needs idle multiprocessors: the
// products of those ten took 0.1755 ms, 0.1836 in long chains; with four iterations instead of five 0.1362
// and 0.1449.
Tuning tune(const NsBank* banks, int count, int multiprocessors) {
  int64_t panels = 0;
  for (int i = 0; i < count; ++i) panels += banks[i].batch * tiles_of(short_side(banks[i]), kTile);
  return {.chunk = panels < multiprocessors ? 1 : 2,
          .shared_tile = panels * 4 < multiprocessors,
          .short_chains = panels * 3 < multiprocessors};
}

bool shape_fits(const NsBank& bank) {
  const auto side_fits = [](int64_t side) { return side >= 8 && side % 8 == 0 && side <= (1 << 16); };
  return bank.batch >= 1 && bank.batch < (1 << 20) && side_fits(bank.rows) && side_fits(bank.cols) &&
         bank.batch * chunks_of(bank) < (1 << 24);
}

int banks_of_launch(const NsBank* banks, int count, int steps) {
  int here = 0, products = 0;
  while (here < std::min(count, kMaxBanks) && products + product_count(banks[here], steps) <= kMaxProducts) {
    products += product_count(banks[here++], steps);
  }
  return here;
}

int64_t chunks_of(const NsBank& bank) { return (bank.rows * bank.cols + kChunk - 1) / kChunk; }

WorkspaceLayout::WorkspaceLayout(const NsBank* bank_list, int count, int steps, const Tuning& tuning)
    : banks{} {
  int64_t chunks = 0, all = 0;
  for (int i = 0; i < count; ++i) {
    // A caller that scales X itself sums each matrix in kNsParts parts.
    chunks += bank_list[i].batch * std::max(chunks_of(bank_list[i]), int64_t{kNsParts});
    all += bank_list[i].batch;
  }
  matrices = static_cast<int>(all);
  counter_count = 2 * matrices + 1;
  partials = 0;
  sigma = static_cast<size_t>(3 * chunks) * sizeof(float);
  counters = sigma + static_cast<size_t>(all) * sizeof(float);
  bytes = round_up(counters + static_cast<size_t>(counter_count) * sizeof(uint32_t));
  for (int i = 0; i < count; ++i) banks[i] = lay_out(bank_list[i], steps, tuning, bytes);
}

bool has_buffer(const NsBank& bank, const BankLayout& layout, int buffer) {
  if (buffer == kSpare) return layout.has_spare;
  if (buffer < kSquaresOut || buffer >= kFactor) return true;
  if (layout.short_chain) return buffer >= kSquaresX;
  return (buffer - kSquaresOut) % 3 < long_side(bank) / short_side(bank);
}

BufferLayout find_buffer(const NsBank& bank, const BankLayout& layout, int buffer) {
  const int64_t size = bank.rows * bank.cols, side = short_side(bank), square = side * side;
  const bool out_is_half = bank.type != NsType::kFloat32;
  const size_t out = out_is_half ? 0 : layout.half_out;
  const auto whole = [&](bool in_output, size_t offset) {
    return BufferLayout{
        .in_output = in_output, .offset = offset, .stride = size, .rows = bank.rows, .cols = bank.cols};
  };
  const auto squares = [&](bool in_output, size_t offset, int64_t stride) {
    return BufferLayout{
        .in_output = in_output, .offset = offset, .stride = stride, .rows = side, .cols = side};
  };
  if (buffer == kOut) return whole(out_is_half, out);
  if (buffer == kX) return whole(false, layout.x);
  if (buffer == kFactor) return squares(false, layout.factor, square);
  if (buffer == kSpare) return squares(false, layout.spare, square);
  const auto index = static_cast<size_t>((buffer - kSquaresOut) % 3);
  const auto square_bytes = static_cast<size_t>(square) * 2;
  if (layout.short_chain) {
    return squares(false, layout.factor + index * static_cast<size_t>(bank.batch) * square_bytes, square);
  }
  const bool around_out = buffer < kSquaresX;
  return squares(around_out && out_is_half, (around_out ? out : layout.x) + index * square_bytes, size);
}

int schedule(const NsBank* banks, int count, const float (*table)[3], int steps,
             const WorkspaceLayout& layout, const Tuning& tuning, int multiprocessors, ProductQueue& queue) {
  std::vector<std::vector<Product>> chains;
  int products = 0, matrices = 0;
  for (int i = 0; i < count; ++i) {
    ChainWriter writer(banks[i], layout.banks[i], i * kMapsPerBank, matrices, tuning);
    chains.push_back(writer.write(table, steps));
    for (const Product& p : chains.back()) queue.products[products++] = p;
    matrices += static_cast<int>(banks[i].batch);
  }
  queue.run_count = 0;
  queue.matrices = matrices;
  return queue_strands(make_strands(chains, banks, multiprocessors), multiprocessors, queue);
}

}  // namespace ns90
}  // namespace pgolf
