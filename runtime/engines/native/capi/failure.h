// An error with the status that C callers get.
#pragma once

#include <stdexcept>
#include <string>

namespace coreinfer {

struct Failure : std::runtime_error {
  Failure(int code, const std::string& message) : std::runtime_error(message), status(code) {}
  int status;
};

}  // namespace coreinfer
