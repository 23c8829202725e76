// SHA-256 (FIPS 180-4).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace coreinfer {

// As 64 hexadecimal digits. `passed`: called with what was read, from where and how many bytes, about once a megabyte.
std::string sha256(const uint8_t* data, size_t num_bytes, const std::function<void(size_t, size_t)>& passed = nullptr);

}  // namespace coreinfer
