// Functions that C libraries round differently, from sums, products and quotients of doubles in a fixed order: the same
// bits on every platform, where the compiler fuses no product with a sum (-ffp-contract=off).
#pragma once

namespace coreinfer {

struct Direction {
  float cosine, sine;
};

// Of an angle in radians. Below 2^26 the doubles that are rounded are off by less than 2^-50 of themselves: about one float
// in 2^26 is not the nearest one, and then it is the next. Beyond, which no position reaches, it is the C library's.
Direction direction_of(float angle);

// e^x; 0 below -708. Relative error below 2^-51.
double exponential(double x);

// Natural logarithm. Relative error below 2^-51.
double logarithm(double x);

// base^exponent, of a positive base. For results between 2^-32 and 2^32 the double that is rounded is off by less than 2^-46 of
// itself: about one float in 2^21 is not the nearest one.
float power(float base, float exponent);

}  // namespace coreinfer
