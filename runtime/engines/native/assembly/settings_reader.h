// Settings of a config, as far as models of a family are computed with them.
#pragma once

#include <vector>

#include "families.h"

namespace coreinfer {

// Null where the config has none, or the family's row does not name it.
const Json* find_setting(const ModelRecord& record, const Family& family, const char* key);
bool is_given(const ModelRecord& record, const Family& family, const char* key);

// One value or one a layer.
class SettingsReader {
 public:
  SettingsReader(const ModelRecord& record, const Family& family) : record_(record), family_(family) {}

  bool has(const char* key) const { return find_setting(record_, family_, key) != nullptr; }
  bool given(const char* key) const { return is_given(record_, family_, key); }
  double real(const char* key, double otherwise) const { return given(key) ? record_.config.real(key) : otherwise; }
  int integer(const char* key, int otherwise) const { return given(key) ? record_.config.integer(key) : otherwise; }
  // Other than 0.
  double factor(const char* key, double otherwise = 1.0) const;
  // One that must be within bounds.
  int size(const char* key, int least, int most) const;
  const std::vector<Json>& per_layer(const char* key) const;

 private:
  const ModelRecord& record_;
  const Family& family_;
};

}  // namespace coreinfer
