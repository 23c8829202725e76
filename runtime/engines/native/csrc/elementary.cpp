// Each function is reduced to a short range, where a few terms of its Taylor series are exact enough: what is left out is
// bounded by the first of them (Lagrange's remainder).
#include "elementary.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace coreinfer {
namespace {

// Adding it leaves no place for fractions: the sum is rounded to a whole number, as long as that is below 2^51.
constexpr double kWhole = 0x1.8p52;
inline double nearest(double x) { return (x + kWhole) - kWhole; }

// A polynomial; the highest power's coefficient is first.
template <int kCount>
inline double polynomial(const double (&coefficients)[kCount], double x) {
  double sum = coefficients[0];
  for (int i = 1; i < kCount; ++i) sum = sum * x + coefficients[i];
  return sum;
}

// pi / 2 in parts of 27, 27 and 53 bits: products of the first two with whole numbers below 2^26 are exact.
constexpr double kQuarterTurn[] = {0x1.921fb54p+0, 0x1.10b461p-30, 0x1.a62633145c06ep-58};
constexpr double kQuartersPerRadian = 0.63661977236758134308;
constexpr float kMostAngle = 67108864.0f;  // 2^26

// Inverse factorials of 15, 13, ... 3 and of 16, 14, ... 2. For at most pi / 4 what follows is below 2^-54 of the result.
constexpr double kSine[] = {-1.0 / 1307674368000, 1.0 / 6227020800, -1.0 / 39916800, 1.0 / 362880,
                            -1.0 / 5040,          1.0 / 120,        -1.0 / 6};
constexpr double kCosine[] = {1.0 / 20922789888000, -1.0 / 87178291200, 1.0 / 479001600, -1.0 / 3628800,
                              1.0 / 40320,          -1.0 / 720,         1.0 / 24,        -1.0 / 2};

// Of 13, 12, ... 0. For at most ln 2 / 2 what follows is below 2^-57.
constexpr double kExponential[] = {
    1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
    1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};

// ln((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + s^5 / 5 + ...). For m from sqrt(1/2) to sqrt(2), |s| is below 0.1716, and what
// follows below 2^-60 of the result.
constexpr double kLogarithm[] = {2.0 / 23, 2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13,
                                 2.0 / 11, 2.0 / 9,  2.0 / 7,  2.0 / 5,  2.0 / 3,  2.0};

// ln 2 in parts of 32 and 53 bits.
constexpr double kLn2[] = {0x1.62e42ffp-1, -0x1.718432a1b0e26p-35};

}  // namespace

Direction direction_of(float angle) {
  if (!(std::fabs(angle) < kMostAngle)) return {std::cos(angle), std::sin(angle)};
  const double quarters = nearest(double(angle) * kQuartersPerRadian);
  double rest = double(angle);
  for (const double part : kQuarterTurn) rest -= quarters * part;
  const double square = rest * rest;
  const auto sine = static_cast<float>(rest + rest * square * polynomial(kSine, square));
  const auto cosine = static_cast<float>(1.0 + square * polynomial(kCosine, square));
  switch (static_cast<int64_t>(quarters) & 3) {
    case 0: return {cosine, sine};
    case 1: return {-sine, cosine};
    case 2: return {-cosine, -sine};
    default: return {sine, -cosine};
  }
}

double exponential(double x) {
  if (x < -708.0) return 0.0;
  if (!(x <= 709.0)) return std::exp(x);  // infinite, or not a number
  const double exponent = nearest(x * 1.44269504088896340736);
  const double rest = (x - exponent * kLn2[0]) - exponent * kLn2[1];
  const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(exponent) + 1023) << 52;
  double power_of_two;
  std::memcpy(&power_of_two, &bits, sizeof bits);
  return polynomial(kExponential, rest) * power_of_two;
}

double logarithm(double x) {
  if (!(x > 0.0 && x <= std::numeric_limits<double>::max())) return std::log(x);  // infinite, or not a number
  int exponent;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752440) {
    m *= 2.0;
    --exponent;
  }
  const double s = (m - 1.0) / (m + 1.0);
  return exponent * kLn2[0] + (exponent * kLn2[1] + s * polynomial(kLogarithm, s * s));
}

float power(float base, float exponent) { return static_cast<float>(exponential(exponent * logarithm(base))); }

}  // namespace coreinfer
