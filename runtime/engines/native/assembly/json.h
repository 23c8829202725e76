// JSON (RFC 8259) as manifests and tensor files hold it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace coreinfer {

// A value. What is asked of it by name is refused by that name where it is missing or of another kind.
struct Json {
  enum class Kind { null, boolean, number, string, array, object };

  // The whole text must be one value. Keys that come twice are refused, as are texts that are not UTF-8 and values nested
  // deeper than 64. Throws std::invalid_argument.
  static Json parse(std::string_view text);

  // A member of an object; null where there is none.
  const Json* find(std::string_view key) const;
  const Json& at(std::string_view key) const;
  // Members that must be of that kind. An integer is one of the type's.
  int integer(std::string_view key) const;
  long long size(std::string_view key) const;  // 0 to 2^53
  double real(std::string_view key) const;
  bool flag(std::string_view key) const;
  const std::string& string(std::string_view key) const;
  const std::vector<Json>& array(std::string_view key) const;
  const Json& object(std::string_view key) const;

  // Of an item that is a number without a fraction, from 0 to 2^53.
  long long as_size(const std::string& what) const;
  // Whether it is there and neither null, false, zero nor empty.
  static bool is_given(const Json* value);

  Kind kind = Kind::null;
  bool boolean = false;
  double number = 0.0;
  std::string text;               // of a string, in UTF-8
  std::vector<std::string> keys;  // of an object's items
  std::vector<Json> items;        // of an array or an object

 private:
  const Json& member(std::string_view key, Kind expected) const;
};

}  // namespace coreinfer
