// Times whole layers of matrix products in both layouts: benchmarks/columns.py says what for.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../../runtime/engines/native/csrc/kernels.h"
#include "../../runtime/engines/native/csrc/layer.h"
#include "layers.h"
#include "products.h"

using namespace columns;
using coreinfer::Activations;
using coreinfer::Kernels;
using coreinfer::Range;

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::array<double, kNumKinds>;

constexpr int kNumTokens = 16;  // different ones, in turn

// How each kind of matrix is multiplied: 'r' by rows, as the engine does, or by a design's letter.
struct Plan {
  std::string letters;
  bool by_rows(int kind) const { return letters[kind] == 'r'; }
  Design design(int kind) const {
    switch (letters[kind]) {
      case 'x': return Design::reads;
      case 't': return Design::tiles;
      case 'g': return Design::groups;
      case 's': return Design::streams;
    }
    throw std::invalid_argument("plan: expected four of r, x, t, g, s, got '" + letters + "'");
  }
};

// Rounds one group that is a multiple of the engine's.
void quantize_group(const Activations& x, int size) {
  float largest = 0.0f;
  for (int i = 0; i < size; ++i) largest = std::max(largest, std::fabs(x.values[i]));
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (int i = 0; i < size; ++i) x.codes[i] = static_cast<int8_t>(std::nearbyint(x.values[i] * inverse));
  std::fill_n(x.scales, size / coreinfer::kGroup, largest / 127.0f);
}

// One thread's memory.
struct Own {
  std::array<coreinfer::ActivationBuffer, kNumKinds> inputs;
  std::array<coreinfer::Buffer<float>, kNumKinds> partial;  // of all outputs
  coreinfer::Buffer<int32_t> sums;
  coreinfer::Buffer<float> out;  // what a thread needs of all threads' sums
  Wanted wanted;
};

class Program {
 public:
  Program(const Products& products, const Shape& shape, int group, int num_threads, int most_panel_outputs)
      : products_(products),
        layers_(shape, {products.tile, group}, most_panel_outputs),
        kernels_(&products == &avx2_products() ? coreinfer::avx2_kernels() : coreinfer::avx512_kernels()),
        threads_(num_threads),
        own_(num_threads) {
    std::mt19937 random(2);
    int widest = 0;
    for (int kind = 0; kind < kNumKinds; ++kind) {
      inputs_.emplace_back(shape.inputs(kind), kNumTokens, random);
      widest = std::max(widest, shape.outputs(kind));
      for (Own& own : own_) {
        own.inputs[kind].resize(1, shape.inputs(kind));
        own.partial[kind].resize(shape.outputs(kind));
      }
    }
    out_.resize(widest);
    for (Own& own : own_) {
      own.sums.resize(2 * widest);
      own.out.resize(widest);
    }
  }

  // Throws std::runtime_error: a product is not what the portable kernels make of the wanted inputs.
  void check(const Plan& plan, double share);
  // Mean seconds of a token, by kind of matrix.
  Seconds time(const Plan& plan, double share, int num_tokens);
  double read_gbps();
  const Layers& layers() const { return layers_; }

 private:
  // One product, on one thread; ends behind a barrier, with the sums that the thread needs in its own `out`.
  void multiply(const Plan& plan, double share, int layer, int kind, int token, int thread);
  void multiply_rows(int layer, int kind, int token, int thread);
  void multiply_columns(Design design, double share, int layer, int kind, int token, int thread);
  // The thread's inputs of a token, quantized: groups [begin, end) of as many inputs as share a scale.
  Activations quantized(int kind, int token, int thread, int group, Range groups);
  // What the portable kernels make of the inputs, rounded in such groups.
  std::vector<float> expected(int kind, int token, int group, double share);

  const Products& products_;
  Layers layers_;
  const Kernels& kernels_;
  coreinfer::Threads threads_;
  std::vector<Inputs> inputs_;
  std::vector<Own> own_;
  coreinfer::Buffer<float> out_;
};

Activations Program::quantized(int kind, int token, int thread, int group, Range groups) {
  Activations x = own_[thread].inputs[kind].view;
  x.values = inputs_[kind].values.view.token(token).values;
  if (group == coreinfer::kGroup)
    kernels_.quantize(x.from(size_t(groups.begin) * group), (groups.end - groups.begin) * group, 1);
  else
    for (int g = groups.begin; g < groups.end; ++g) quantize_group(x.from(size_t(g) * group), group);
  return x;
}

void Program::multiply(const Plan& plan, double share, int layer, int kind, int token, int thread) {
  if (plan.by_rows(kind)) return multiply_rows(layer, kind, token, thread);
  multiply_columns(plan.design(kind), share, layer, kind, token, thread);
}

void Program::multiply_rows(int layer, int kind, int token, int thread) {
  const coreinfer::Matrix& w = layers_.rows[layer][kind];
  const Activations x = quantized(kind, token, thread, coreinfer::kGroup, {0, w.num_groups()});
  coreinfer::multiply_share(kernels_, {{&w, out_.get()}}, {x, 1, 0}, 0, thread, threads_);
  const int next = kind + 1 < kNumKinds ? layer : (layer + 1) % layers_.shape.layers;
  coreinfer::prefetch_share({&layers_.rows[next][(kind + 1) % kNumKinds]}, thread, threads_.size());
  threads_.barrier(thread);
}

void Program::multiply_columns(Design design, double share, int layer, int kind, int token, int thread) {
  const ColumnMatrix& w = layers_.columns[layer][kind];
  Own& own = own_[thread];
  const Inputs& inputs = inputs_[kind];
  const Range groups = coreinfer::share(w.num_groups(), thread, threads_.size());
  const Activations x = quantized(kind, token, thread, w.layout.group, groups);
  products_.choose({x, inputs.norms.data(), inputs.threshold(token, share)}, w, groups.begin, groups.end, own.wanted);
  float* partial = own.partial[kind].get();
  std::fill_n(partial, w.outputs, 0.0f);
  products_.multiply(design, w, own.wanted, own.sums.get(), partial);
  threads_.barrier(thread);
  // Each thread keeps the residual stream, and needs of the others no more than the part that it goes on with.
  const bool all = kind == kOut || kind == kDown;
  const Range needed = all ? Range{0, w.outputs / 8} : coreinfer::share(w.outputs / 8, thread, threads_.size());
  const size_t first = size_t(needed.begin) * 8;
  float* out = own.out.get() + first;
  const int count = (needed.end - needed.begin) * 8;
  std::copy_n(own_[0].partial[kind].get() + first, count, out);
  for (int t = 1; t < threads_.size(); ++t) kernels_.add(out, own_[t].partial[kind].get() + first, count);
}

std::vector<float> Program::expected(int kind, int token, int group, double share) {
  const coreinfer::Matrix& w = layers_.rows[0][kind];
  const Activations x = quantized(kind, token, 0, group, {0, w.cols / group});
  const float threshold = inputs_[kind].threshold(token, share);
  for (int g = 0; g < w.num_groups(); ++g) {
    int sum = 0;
    for (int i = g * coreinfer::kGroup; i < (g + 1) * coreinfer::kGroup; ++i) {
      if (!(std::fabs(x.values[i]) * inputs_[kind].norms[i] > threshold)) x.codes[i] = 0;
      sum += x.codes[i];
    }
    x.sums[g] = sum / 16.0f;
  }
  std::vector<float> y(w.rows);
  coreinfer::portable_kernels().multiply(w, x, 1, y.data(), 0, 0, w.num_blocks());
  return y;
}

void Program::check(const Plan& plan, double share) {
  if (plan.letters.size() != kNumKinds)
    throw std::invalid_argument("plan: expected four letters, got '" + plan.letters + "'");
  for (int kind = 0; kind < kNumKinds; ++kind) {
    if (!plan.by_rows(kind) && plan.design(kind) == Design::reads) continue;
    const double read = plan.by_rows(kind) ? 1.0 : share;
    const int group = plan.by_rows(kind) ? coreinfer::kGroup : layers_.columns[0][kind].layout.group;
    const std::vector<float> want = expected(kind, 1, group, read);
    threads_.run([&](int thread) { multiply(plan, share, layers_.shape.layers - 1, kind, 1, thread); });
    double squares = 0, worst = 0;
    for (float y : want) squares += double(y) * y;
    const bool all = plan.by_rows(kind) || kind == kOut || kind == kDown;
    const int num_outputs = static_cast<int>(want.size());
    for (int thread = 0; thread < threads_.size(); ++thread) {
      const float* got = plan.by_rows(kind) ? out_.get() : own_[thread].out.get();
      const Range needed = all ? Range{0, num_outputs / 8} : coreinfer::share(num_outputs / 8, thread, threads_.size());
      for (int i = needed.begin * 8; i < needed.end * 8; ++i) {
        const double error = std::fabs(double(got[i]) - want[i]);
        if (!(error <= worst)) worst = error;  // also where it is not a number
      }
    }
    const double relative = worst / std::sqrt(squares / num_outputs);
    if (!(relative < 1e-5))
      throw std::runtime_error(
          "plan " + plan.letters + ", matrix " + std::to_string(kind) + ", share " + std::to_string(share) +
          ": largest error expected below 1e-5 of the outputs' root mean square, got " + std::to_string(relative));
  }
}

Seconds Program::time(const Plan& plan, double share, int num_tokens) {
  Seconds seconds{};
  threads_.run([&](int thread) {
    threads_.barrier(thread);
    Clock::time_point last = Clock::now();
    for (int t = 0; t < num_tokens; ++t)
      for (int layer = 0; layer < layers_.shape.layers; ++layer)
        for (int kind = 0; kind < kNumKinds; ++kind) {
          multiply(plan, share, layer, kind, (t * 5 + layer * 3) % kNumTokens, thread);
          if (thread != 0) continue;
          const Clock::time_point now = Clock::now();
          seconds[kind] += std::chrono::duration<double>(now - last).count() / num_tokens;
          last = now;
        }
  });
  return seconds;
}

double Program::read_gbps() {
  const size_t num_words = layers_.row_bytes / 8;
  const auto* words = reinterpret_cast<const uint64_t*>(layers_.row_memory());
  std::vector<uint64_t> sums(threads_.size());
  const Clock::time_point start = Clock::now();
  threads_.run([&](int thread) {
    const size_t begin = num_words / threads_.size() * thread, count = num_words / threads_.size();
    sums[thread] = kernels_.read_sum(words + begin, count);
  });
  return num_words * 8 / std::chrono::duration<double>(Clock::now() - start).count() / 1e9;
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::istringstream stream(list);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

void print_run(const Plan& plan, double share, const Seconds& seconds, bool first) {
  std::printf("%s{\"plan\": \"%s\", \"share\": %g, \"seconds\": [%.9f, %.9f, %.9f, %.9f]}", first ? "" : ", ",
              plan.letters.c_str(), share, seconds[0], seconds[1], seconds[2], seconds[3]);
}

int measure(char** arguments) {
  const std::string isa = *arguments++;
  if (isa != "avx2" && isa != "avx512") throw std::invalid_argument("ISA: expected avx2 or avx512, got '" + isa + "'");
  const int group = std::atoi(*arguments++);
  if (group != 32 && (group != 64 || isa == "avx2"))
    throw std::invalid_argument("GROUP: expected 32, or 64 with avx512, got " + std::to_string(group));
  const Shape shape{std::atoi(arguments[0]), std::atoi(arguments[1]), std::atoi(arguments[2]), std::atoi(arguments[3])};
  const int num_threads = std::atoi(arguments[4]), most = std::atoi(arguments[5]);
  const int num_rounds = std::atoi(arguments[6]), num_tokens = std::atoi(arguments[7]);
  Program program(isa == "avx2" ? avx2_products() : avx512_products(), shape, group, num_threads, most);
  struct Run {
    Plan plan;
    double share;
  };
  std::vector<Run> runs;
  for (const std::string& letters : split(arguments[8]))
    for (const std::string& share : split(arguments[9])) {
      if (letters == "rrrr" && !runs.empty()) continue;  // the same at every share
      runs.push_back({{letters}, std::atof(share.c_str())});
    }
  for (const Run& run : runs) program.check(run.plan, run.share);
  std::printf("{\"row_bytes\": %zu, \"rounds\": [", program.layers().row_bytes);
  for (int round = 0; round < num_rounds; ++round) {
    std::printf("%s{\"read_gbps\": %.3f, \"runs\": [", round ? ", " : "", program.read_gbps());
    for (size_t i = 0; i < runs.size(); ++i)
      print_run(runs[i].plan, runs[i].share, program.time(runs[i].plan, runs[i].share, num_tokens), i == 0);
    std::printf("]}");
  }
  std::printf("]}\n");
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 13) {
    std::fprintf(stderr,
                 "expected ISA GROUP HIDDEN QKV FFN LAYERS THREADS MOST_PANEL_OUTPUTS ROUNDS TOKENS PLANS SHARES\n");
    return 2;
  }
  try {
    return measure(arguments + 1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
