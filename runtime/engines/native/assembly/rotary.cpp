#include "rotary.h"

#include <algorithm>
#include <cmath>

#include "elementary.h"
#include "refusals.h"

namespace coreinfer {
namespace {

using Floats = std::vector<float>;

constexpr double kTurn = 2 * 3.14159265358979323846;

double given_or(const Json& parameters, const char* key, double otherwise) {
  return Json::is_given(parameters.find(key)) ? parameters.real(key) : otherwise;
}

// One set of factors for all texts that are read.
bool is_one_set(const Json& parameters, const Context& context) {
  const std::vector<Json>&shorts = parameters.array("short_factor"), &longs = parameters.array("long_factor");
  const auto alike = [](const Json& a, const Json& b) { return a.number == b.number; };
  return std::equal(shorts.begin(), shorts.end(), longs.begin(), longs.end(), alike) ||
         context.max_positions <= parameters.real("original_max_position_embeddings");
}

bool is_known(const std::string& kind, const Json& parameters, const Context& context) {
  for (const char* known : {"default", "linear", "llama3", "yarn"})
    if (kind == known) return true;
  return kind == "longrope" && is_one_set(parameters, context);
}

void divide(Floats& frequencies, const Json& parameters) {
  const auto factor = static_cast<float>(parameters.real("factor"));
  for (float& frequency : frequencies) frequency /= factor;
}

// Long waves are slowed down by `factor`, short ones are left, and those in between blended.
void scale_llama3(Floats& frequencies, const Json& parameters) {
  const auto factor = static_cast<float>(parameters.real("factor"));
  const double low = parameters.real("low_freq_factor"), high = parameters.real("high_freq_factor");
  const auto length = static_cast<float>(parameters.real("original_max_position_embeddings"));
  for (float& frequency : frequencies) {
    const float turns = length * frequency / static_cast<float>(kTurn);
    const float place = (turns - static_cast<float>(low)) / static_cast<float>(high - low);
    const float blend = std::min(std::max(place, 0.0f), 1.0f);
    frequency *= blend + (1 - blend) / factor;
  }
}

// YaRN (arXiv 2309.00071): long waves by `factor`, short ones not, a ramp between two places of the head.
void scale_yarn(Floats& frequencies, const Json& parameters, int size) {
  const double theta = parameters.real("rope_theta"), length = parameters.real("original_max_position_embeddings");
  const auto place_of = [&](double turns) {
    return size * logarithm(length / (turns * kTurn)) / (2 * logarithm(theta));
  };
  double first = place_of(given_or(parameters, "beta_fast", 32)), last = place_of(given_or(parameters, "beta_slow", 1));
  if (!parameters.find("truncate") || Json::is_given(parameters.find("truncate"))) {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = std::max(first, 0.0);
  last = std::min(last, size - 1.0);
  // As transformers avoids a ramp of no length.
  const double span = last == first ? 0.001 : last - first;
  const auto factor = static_cast<float>(parameters.real("factor"));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float place = (static_cast<float>(i) - static_cast<float>(first)) / static_cast<float>(span);
    const float ramp = std::min(std::max(place, 0.0f), 1.0f);
    frequencies[i] = frequencies[i] / factor * ramp + frequencies[i] * (1 - ramp);
  }
}

double magnitude(double factor, double weight) { return factor <= 1.0 ? 1.0 : 0.1 * weight * logarithm(factor) + 1.0; }

double yarn_magnitude(const Json& parameters) {
  const Json* stated = parameters.find("attention_factor");
  if (stated && stated->kind != Json::Kind::null) return parameters.real("attention_factor");
  const double factor = parameters.real("factor");
  const double numerator = given_or(parameters, "mscale", 0), denominator = given_or(parameters, "mscale_all_dim", 0);
  if (numerator != 0 && denominator != 0) return magnitude(factor, numerator) / magnitude(factor, denominator);
  return magnitude(factor, 1.0);
}

// LongRoPE (arXiv 2402.13753), as transformers has it.
double longrope_magnitude(const Json& parameters, const Context& context) {
  const Json* stated = parameters.find("attention_factor");
  if (stated && stated->kind != Json::Kind::null) return parameters.real("attention_factor");
  const double original = parameters.real("original_max_position_embeddings");
  const double factor = given_or(parameters, "factor", context.stated / original);
  return factor <= 1.0 ? 1.0 : std::sqrt(1.0 + logarithm(factor) / logarithm(original));
}

void divide_each(Floats& frequencies, const std::vector<Json>& factors) {
  if (factors.size() != frequencies.size())
    refuse("short_factor", std::to_string(frequencies.size()) + " numbers", std::to_string(factors.size()));
  for (size_t i = 0; i < factors.size(); ++i) {
    if (factors[i].kind != Json::Kind::number) refuse("short_factor", "numbers", "another value");
    frequencies[i] /= static_cast<float>(factors[i].number);
  }
}

}  // namespace

RotaryTable rotary_table(const Json& parameters, int size, const Context& context) {
  const std::string kind = parameters.find("rope_type") ? parameters.string("rope_type") : "default";
  if (!is_known(kind, parameters, context))
    throw Unsupported("rotary embeddings '" + kind +
                      "': the native engine has default, linear, llama3, yarn, and longrope with one set of factors");
  const auto theta = static_cast<float>(parameters.real("rope_theta"));
  RotaryTable table;
  for (int i = 0; i < size; i += 2)
    table.inverse_frequencies.push_back(1.0f / power(theta, static_cast<float>(i) / static_cast<float>(size)));
  if (kind == "linear") {
    divide(table.inverse_frequencies, parameters);
  } else if (kind == "llama3") {
    scale_llama3(table.inverse_frequencies, parameters);
  } else if (kind == "yarn") {
    scale_yarn(table.inverse_frequencies, parameters, size);
    table.scale = static_cast<float>(yarn_magnitude(parameters));
  } else if (kind == "longrope") {
    divide_each(table.inverse_frequencies, parameters.array("short_factor"));
    table.scale = static_cast<float>(longrope_magnitude(parameters, context));
  }
  return table;
}

}  // namespace coreinfer
