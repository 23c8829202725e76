#include "json.h"

#include <cmath>
#include <limits>
#include <locale>
#include <sstream>
#include <unordered_set>

#include "refusals.h"

namespace coreinfer {
namespace {

constexpr int kMostNested = 64;
constexpr double kMostExact = 9007199254740992.0;  // 2^53

const char* name_of(Json::Kind kind) {
  static const char* const names[] = {"null", "a truth value", "a number", "a string", "an array", "an object"};
  return names[static_cast<int>(kind)];
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// How many bytes the UTF-8 sequence at the start of a text has; 0 where there is none.
size_t sequence_length(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto follows = [&](size_t i) { return (byte(i) & 0xc0) == 0x80; };
  const unsigned first = byte(0), second = byte(1);
  if (first < 0x80) return 1;
  if (first < 0xc2 || first > 0xf4 || !follows(1)) return 0;
  if (first < 0xe0) return 2;
  if (!follows(2)) return 0;
  if (first < 0xf0) return (first == 0xe0 && second < 0xa0) || (first == 0xed && second >= 0xa0) ? 0 : 3;
  return !follows(3) || (first == 0xf0 && second < 0x90) || (first == 0xf4 && second >= 0x90) ? 0 : 4;
}

void append_utf8(std::string& out, unsigned code) {
  const auto put = [&](unsigned byte) { out.push_back(static_cast<char>(byte)); };
  if (code < 0x80) return put(code);
  if (code < 0x800) {
    put(0xc0 | code >> 6);
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12);
    put(0x80 | (code >> 6 & 63));
  } else {
    put(0xf0 | code >> 18);
    put(0x80 | (code >> 12 & 63));
    put(0x80 | (code >> 6 & 63));
  }
  put(0x80 | (code & 63));
}

class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  Json whole() {
    Json value = read(0);
    skip_space();
    if (at_ != text_.size()) fail("one value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& expected) const {
    refuse("JSON, byte " + std::to_string(at_), expected, at_ < text_.size() ? "something else" : "the end");
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }

  Json read(int depth) {
    if (depth > kMostNested) fail("values nested at most 64 deep");
    skip_space();
    Json value;
    if (peek() == '{') {
      read_object(value, depth);
    } else if (peek() == '[') {
      read_array(value, depth);
    } else if (peek() == '"') {
      value.kind = Json::Kind::string;
      value.text = read_string();
    } else if (peek() == '-' || is_digit(peek())) {
      value.kind = Json::Kind::number;
      value.number = read_number();
    } else {
      read_word(value);
    }
    return value;
  }

  void read_word(Json& value) {
    for (const std::string_view word : {"true", "false", "null"})
      if (text_.substr(at_, word.size()) == word) {
        at_ += word.size();
        value.kind = word == "null" ? Json::Kind::null : Json::Kind::boolean;
        value.boolean = word == "true";
        return;
      }
    fail("a value");
  }

  void read_array(Json& value, int depth) {
    value.kind = Json::Kind::array;
    ++at_;
    skip_space();
    if (take(']')) return;
    do {
      value.items.push_back(read(depth + 1));
      skip_space();
    } while (take(','));
    if (!take(']')) fail("a comma or ]");
  }

  void read_object(Json& value, int depth) {
    value.kind = Json::Kind::object;
    std::unordered_set<std::string> seen;
    ++at_;
    skip_space();
    if (take('}')) return;
    do {
      skip_space();
      if (peek() != '"') fail("a key");
      value.keys.push_back(read_string());
      if (!seen.insert(value.keys.back()).second) fail("another key than '" + value.keys.back() + "' again");
      skip_space();
      if (!take(':')) fail("a colon");
      value.items.push_back(read(depth + 1));
      skip_space();
    } while (take(','));
    if (!take('}')) fail("a comma or }");
  }

  std::string read_string() {
    std::string out;
    for (++at_; !take('"');) {
      const char c = peek();
      if (at_ >= text_.size() || static_cast<unsigned char>(c) < 0x20) fail("the rest of a string");
      if (take('\\')) {
        read_escape(out);
        continue;
      }
      const size_t length = sequence_length(text_.substr(at_));
      if (length == 0) fail("UTF-8");
      out.append(text_.substr(at_, length));
      at_ += length;
    }
    return out;
  }

  void read_escape(std::string& out) {
    static constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const size_t place = at_ < text_.size() ? kNames.find(text_[at_]) : std::string_view::npos;
    if (place != std::string_view::npos) {
      ++at_;
      return out.push_back(kMeanings[place]);
    }
    unsigned code = read_unit();
    if (code >= 0xd800 && code < 0xdc00) {
      if (!take('\\')) fail("the second half of a character");
      const unsigned low = read_unit();
      if (low < 0xdc00 || low > 0xdfff) fail("the second half of a character");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code >= 0xdc00 && code < 0xe000) {
      fail("the first half of a character");
    }
    append_utf8(out, code);
  }

  // uXXXX
  unsigned read_unit() {
    if (!take('u')) fail("an escape");
    unsigned code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const size_t digit = std::string_view("0123456789abcdef").find(peek() | 0x20);
      if (at_ >= text_.size() || digit == std::string_view::npos) fail("four hexadecimal digits");
      code = code << 4 | static_cast<unsigned>(digit);
    }
    return code;
  }

  double read_number() {
    const size_t start = at_;
    take('-');
    const size_t first = at_;
    skip_digits();
    if (text_[first] == '0' && at_ - first > 1) fail("a number without leading zeros");
    bool whole = true;
    if (take('.')) {
      whole = false;
      skip_digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false;
      ++at_;
      if (!take('-')) take('+');
      skip_digits();
    }
    const std::string digits(text_.substr(start, at_ - start));
    if (whole && digits.size() <= 15) return std::stod(digits);  // no point that a locale could write otherwise
    return real_of(digits);
  }

  double real_of(const std::string& digits) const {
    std::istringstream stream(digits);
    stream.imbue(std::locale::classic());
    double value = 0.0;
    stream >> value;
    if (stream.fail() || !std::isfinite(value)) fail("a number within the range of a double");
    return value;
  }

  void skip_digits() {
    if (!is_digit(peek())) fail("a digit");
    while (is_digit(peek())) ++at_;
  }

  std::string_view text_;
  size_t at_ = 0;
};

std::string quoted(std::string_view key) { return "'" + std::string(key) + "'"; }

}  // namespace

Json Json::parse(std::string_view text) { return Reader(text).whole(); }

const Json* Json::find(std::string_view key) const {
  for (size_t i = 0; i < keys.size(); ++i)
    if (keys[i] == key) return &items[i];
  return nullptr;
}

const Json& Json::at(std::string_view key) const {
  const Json* value = find(key);
  if (!value) refuse(quoted(key), "a value", "none");
  return *value;
}

const Json& Json::member(std::string_view key, Kind expected) const {
  const Json& value = at(key);
  if (value.kind != expected) refuse(quoted(key), name_of(expected), name_of(value.kind));
  return value;
}

int Json::integer(std::string_view key) const {
  const double value = member(key, Kind::number).number;
  if (value != std::floor(value) || std::fabs(value) > std::numeric_limits<int>::max())
    refuse(quoted(key), "an integer of 32 bits", std::to_string(value));
  return static_cast<int>(value);
}

long long Json::size(std::string_view key) const { return at(key).as_size(quoted(key)); }
double Json::real(std::string_view key) const { return member(key, Kind::number).number; }
bool Json::flag(std::string_view key) const { return member(key, Kind::boolean).boolean; }
const std::string& Json::string(std::string_view key) const { return member(key, Kind::string).text; }
const std::vector<Json>& Json::array(std::string_view key) const { return member(key, Kind::array).items; }
const Json& Json::object(std::string_view key) const { return member(key, Kind::object); }

long long Json::as_size(const std::string& what) const {
  if (kind != Kind::number || number < 0 || number > kMostExact || number != std::floor(number))
    refuse(what, "a size", kind == Kind::number ? std::to_string(number) : name_of(kind));
  return static_cast<long long>(number);
}

bool Json::is_given(const Json* value) {
  if (!value) return false;
  switch (value->kind) {
    case Kind::null: return false;
    case Kind::boolean: return value->boolean;
    case Kind::number: return value->number != 0.0;
    case Kind::string: return !value->text.empty();
    default: return !value->items.empty();
  }
}

}  // namespace coreinfer
