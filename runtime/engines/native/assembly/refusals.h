// How what comes from outside is refused: by exceptions that name it.
#pragma once

#include <stdexcept>
#include <string>

namespace coreinfer {

// A model that the engine does not compute, though nothing is wrong with it.
struct Unsupported : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Throws std::invalid_argument.
[[noreturn]] inline void refuse(const std::string& what, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(what + ": expected " + expected + ", got " + got);
}

}  // namespace coreinfer
