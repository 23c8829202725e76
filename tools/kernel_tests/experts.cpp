// Which experts a token uses, and their weights.
#include <cmath>
#include <limits>
#include <vector>

#include "../../runtime/engines/native/csrc/experts.h"
#include "checks.h"

using namespace coreinfer;

namespace {

// As many experts as there are logits, of which some are left out.
std::vector<ChosenExpert> choose(const std::vector<float>& logits, int num_chosen, bool normalizes,
                                 const std::vector<int>& absent = {}, const float* bias = nullptr) {
  const int num_experts = static_cast<int>(logits.size());
  Router router;
  router.weight.rows = num_experts;
  router.num_chosen = num_chosen;
  router.bias = bias;
  router.normalizes = normalizes;
  FfnWeights ffn;
  ffn.experts.resize(num_experts);
  for (FfnWeights& expert : ffn.experts) expert.up.weight.rows = kUnit;
  for (const int number : absent) ffn.experts[number].up.weight.rows = 0;
  std::vector<ChosenExpert> chosen(num_chosen);
  choose_experts(router, ffn, logits.data(), chosen.data());
  return chosen;
}

bool is(const ChosenExpert& got, int expert, double weight) {
  return got.expert == expert && std::fabs(got.weight - weight) < 1e-6;
}

}  // namespace

void test_experts() {
  // Shares 1, 2, 4 and 1 of 8.
  const std::vector<float> logits = {0.0f, std::log(2.0f), std::log(4.0f), 0.0f};
  const auto all = choose(logits, 2, false);
  expect("experts: expected their shares of all", is(all[0], 1, 2.0 / 8) && is(all[1], 2, 4.0 / 8));
  const auto normalized = choose(logits, 2, true);
  expect("experts: expected shares of the chosen", is(normalized[0], 1, 2.0 / 6) && is(normalized[1], 2, 4.0 / 6));
  const auto without = choose(logits, 2, false, {2});
  expect("experts: expected no share of one that is left out",
         is(without[0], 0, 1.0 / 4) && is(without[1], 1, 2.0 / 4));
  const float bias[] = {std::log(8.0f), 0.0f, -100.0f, 0.0f};
  const auto biased = choose(logits, 2, true, {}, bias);
  expect("experts: expected shares by logits and biases", is(biased[0], 0, 8.0 / 10) && is(biased[1], 1, 2.0 / 10));
  const auto tied = choose({1.0f, 1.0f, 1.0f}, 2, true);
  expect("experts: expected the first of equal ones", is(tied[0], 0, 0.5) && is(tied[1], 1, 0.5));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto broken = choose({nan, nan, nan}, 2, false);
  expect("experts: expected two whatever the logits", broken[0].expert == 0 && broken[1].expert == 1);
}
